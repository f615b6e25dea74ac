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

int main(int argc, char **argv) {
  char message[SPIKENM_MESSAGE];
  spikenm_net *net = argc == 2 ? spikenm_open(argv[1], message) : NULL;
  if (!net) return fprintf(stderr, "%s\n", argc == 2 ? message : "usage: a.out NET.snm"), 1;
  int64_t input[SPIKENM_RANK], step[SPIKENM_RANK], size = 1;
  int32_t time, is_free[SPIKENM_RANK], rank = 0;
  const int32_t axes = spikenm_input(net, input, &time, is_free);
  for (int32_t i = 0; i < axes; ++i)
    if (i != time) size *= step[rank++] = is_free[i] ? 1 : input[i]; /* a batch of one */
  static float frame[1 << 16], votes[1 << 16]; /* as large as any frame of yours */
  int64_t classes = 0;
  while (size <= 1 << 16 && fread(frame, sizeof *frame, (size_t)size, stdin) == (size_t)size) {
    if (spikenm_step(net, frame, step, rank, message)) return fprintf(stderr, "%s\n", message), 1;
    int64_t shape[SPIKENM_RANK];
    const float *spikes = spikenm_output(net, 0, shape, &rank);
    for (classes = 0; classes < shape[rank - 1]; ++classes) votes[classes] += spikes[classes];
    rank = (int32_t)(axes - (time >= 0));
  }
  int64_t best = 0;
  for (int64_t i = 1; i < classes; ++i) best = votes[i] > votes[best] ? i : best;
  printf("%lld\n", (long long)best);
  spikenm_close(net);
  return 0;
}
