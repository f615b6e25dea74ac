/* SPDX-License-Identifier: Apache-2.0
 * Classify a stream with a packed network: no Python, no torch.
 *
 * In Python, once:   spikenm_fx.pack(model, x, program=True).save("net.snm")
 * The library, once: cmake -DSPIKENM_RUNTIME=ON -S spikenm_fx/native -B build
 *                    cmake --build build && cmake --install build --prefix /usr/local
 * This program:      cc 07_stream_in_c.c -lspikenm && ./a.out net.snm < frames.f32
 */
#include <spikenm.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  char message[SPIKENM_MESSAGE];
  spikenm_net *net = argc == 2 ? spikenm_open(argv[1], message) : NULL;
  if (!net) return fprintf(stderr, "%s\n", argc == 2 ? message : "usage: a.out NET.snm"), 1;
  int64_t input[SPIKENM_RANK], step[SPIKENM_RANK], shape[SPIKENM_RANK], classes = 0;
  int32_t time, is_free[SPIKENM_RANK], rank = 0, out_rank = 0;
  const int32_t axes = spikenm_input(net, input, &time, is_free);
  size_t size = 1;
  for (int32_t i = 0; i < axes; ++i)
    if (i != time) size *= (size_t)(step[rank++] = is_free[i] ? 1 : input[i]); /* a batch of one */
  float *frame = malloc(size * sizeof *frame), *votes = NULL;
  while (frame && fread(frame, sizeof *frame, size, stdin) == size) {
    if (spikenm_step(net, frame, step, rank, message)) return fprintf(stderr, "%s\n", message), 1;
    const float *spikes = spikenm_output(net, 0, shape, &out_rank);
    if (!votes) { /* as many classes as the output has numbers */
      for (classes = 1; out_rank > 0; --out_rank) classes *= shape[out_rank - 1];
      votes = calloc((size_t)classes + 1, sizeof *votes);
    }
    for (int64_t i = 0; votes && i < classes; ++i) votes[i] += spikes[i];
  }
  int64_t best = 0;
  for (int64_t i = 1; votes && i < classes; ++i) best = votes[i] > votes[best] ? i : best;
  printf("%lld\n", (long long)best);
  free(frame), free(votes), spikenm_close(net);
  return 0;
}
