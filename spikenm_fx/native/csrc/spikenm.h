/* SPDX-License-Identifier: Apache-2.0
 * Run a packed spiking network from its file, without Python and without torch.
 *
 *   spikenm_net *net = spikenm_open("net.snm", message);
 *   spikenm_step(net, x, shape, rank, message);             one time step; states are kept
 *   const float *y = spikenm_output(net, 0, shape, &rank);  valid until the next call
 *
 * Functions that can fail return 0 on success, else a negative number, and write a sentence into
 * `message`, an array of SPIKENM_MESSAGE characters, or null if it is not wanted.  A network is one
 * stream of spikes with its own states: two threads need two networks, or call one in turn.
 */
#ifndef SPIKENM_H
#define SPIKENM_H
#include <stddef.h>
#include <stdint.h>

#define SPIKENM_API __attribute__((visibility("default")))
#define SPIKENM_MESSAGE 512
#define SPIKENM_RANK 8
#define SPIKENM_INPUTS 8

#ifdef __cplusplus
extern "C" {
#endif

typedef struct spikenm_net spikenm_net;

/* Null on failure.  Everything in the file is checked before it is used. */
SPIKENM_API spikenm_net *spikenm_open(const char *path, char *message);
SPIKENM_API spikenm_net *spikenm_open_bytes(const void *bytes, size_t size, char *message);
SPIKENM_API void spikenm_close(spikenm_net *net);

/* All states back to rest. */
SPIKENM_API void spikenm_reset(spikenm_net *net);

/* The example's input shape; which axis is time (-1: none) and which may have another size. */
SPIKENM_API int32_t spikenm_input(const spikenm_net *net, int64_t *shape, int32_t *time_axis,
                                  int32_t *is_free);

/* The whole input, as the model takes it: all time steps that it has. */
SPIKENM_API int32_t spikenm_run(spikenm_net *net, const float *x, const int64_t *shape,
                                int32_t rank, char *message);

/* One time step: `shape` is that of the input without its time axis, and outputs have none. */
SPIKENM_API int32_t spikenm_step(spikenm_net *net, const float *x, const int64_t *shape,
                                 int32_t rank, char *message);

/* A network of several inputs takes a pointer, a shape and a rank for each, in order. */
SPIKENM_API int32_t spikenm_inputs(const spikenm_net *net);
SPIKENM_API int32_t spikenm_input_at(const spikenm_net *net, int32_t index, int64_t *shape,
                                     int32_t *time_axis, int32_t *is_free);
SPIKENM_API int32_t spikenm_run_all(spikenm_net *net, int32_t count, const float *const *x,
                                    const int64_t *const *shapes, const int32_t *ranks,
                                    char *message);
SPIKENM_API int32_t spikenm_step_all(spikenm_net *net, int32_t count, const float *const *x,
                                     const int64_t *const *shapes, const int32_t *ranks,
                                     char *message);

SPIKENM_API int32_t spikenm_outputs(const spikenm_net *net);

/* An output of the last call; null if there is none.  It stays valid until the next one. */
SPIKENM_API const float *spikenm_output(const spikenm_net *net, int32_t index, int64_t *shape,
                                        int32_t *rank);

#ifdef __cplusplus
}
#endif
#endif
