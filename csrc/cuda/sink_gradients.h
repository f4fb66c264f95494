// Backward: dk and dv of sinks, which rows of many tiles add to. Preprocess sums up what the rows of its tile add to
// the one sink that lies before the tile; SinkGradients, after all other kernels, sums up these partial sums, and adds
// the rows of the document's first tile. All in an order that is always the same: no atomics.
#pragma once

#include "bwd_tiles.h"

namespace longlora::cuda {

// The sums of dk and dv of one sink: those of this thread, over some rows and eight columns a piece.
template <typename Element, int kPieces>
struct SinkSums {
  float dk[kPieces][8] = {};
  float dv[kPieces][8] = {};

  DEVICE void add(int piece, float ds, const Piece& q, float weight, const Piece& dout) {
    add_times<Element>(dk[piece], ds, q);
    add_times<Element>(dv[piece], weight, dout);
  }
};

// The same as it lies in memory: four lines of dk's first and last four of eight columns, then dv's, piece by piece.
template <int kHeadDim>
struct SinkLines {
  static constexpr int kPieces = kHeadDim / 8;
  static constexpr int kFours = 4 * kPieces, kFloats = 4 * kFours;

  // Preprocess left them there for a tile of rows.
  DEVICE static float* of_tile(const BackwardParams& params, int row_tile) {
    return params.sink_sums + int64_t{row_tile} * kFloats;
  }

  // One of the fours of lines, added up over kParts of them that follow each other.
  template <int kParts>
  DEVICE static void sum(const Four* parts, int four, float (&sums)[4]) {
    for (int part = 0; part < kParts; ++part) {
      alignas(16) float values[4];
      Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(parts[part * kFours + four]),
                            reinterpret_cast<uint128_t&>(values));
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) sums[x] += values[x];
    }
  }
};

// Adds what the rows of a tile leave to dk and dv of the first tokens of documents that begin in a tile of keys.
template <typename Element, int kHeadDim, int kKib>
struct SinkGradients {
  using Params = BackwardParams;
  using Tiles = BackwardTiles<Element, kHeadDim, kKib>;
  using Shared = SinkGradientsShared<kHeadDim, kKib>;
  using Lines = SinkLines<kHeadDim>;
  static constexpr int kRows = Tiles::kRows, kKeys = Tiles::kKeys, kThreads = Shared::kThreads;
  static constexpr int kPieces = Lines::kPieces, kGroups = kThreads / kPieces;  // of threads
  static constexpr bool kLastFirst = false;

  static Schedule schedule(const Problem& problem, int64_t l2_bytes) {
    return Schedule(problem, l2_bytes, problem.seqlen_k, kKeys, problem.kv_heads, problem.kv_heads, Tiles::kRowBytes);
  }

  DEVICE static void run(const BackwardParams& params, const Turn& turn, Shared& shared) {
    const int key = turn.tile * kKeys, thread = threadIdx.x;
    find_rows(params, turn.batch, key, shared, thread);
    sync_block();  // the rows of all keys are found
    CUTE_NO_UNROLL
    for (int j = 0; j < kKeys; ++j) {
      int end;
      Move<int>::copy(shared.row_ends[j], end);
      if (end == 0) continue;
      sum_over_heads(params, turn.batch, turn.head, key + j, end, shared, thread);
      sync_block();  // all have summed
      if (thread < Lines::kFours) add_to_gradients(params, turn.batch, turn.head, key + j, shared, thread);
      sync_block();  // nobody reads the sums any more
    }
  }

 private:
  // The first of the rows [begin, end) for which `holds`; from there on it does.
  template <class Holds>
  DEVICE static int first_of(int begin, int end, const Holds& holds) {
    while (begin < end) {
      const int middle = begin + (end - begin) / 2;
      if (holds(middle))
        end = middle;
      else
        begin = middle + 1;
    }
    return begin;
  }

  // One key a thread: past the last row that sees it as its sink; 0 where none does. Of its document, rows that do not
  // come first.
  DEVICE static void find_rows(const BackwardParams& params, int batch, int key, Shared& shared, int thread) {
    if (thread >= kKeys) return;
    const Problem& problem = params.problem;
    const int d = key + thread;
    const Visibility visible(problem, batch, 0), last_head(problem, batch, static_cast<int>(problem.heads) - 1);
    const int first = cute::max(d - visible.offset, 0);
    int end = 0;
    if (first < visible.seqlen && visible.document(first) == d) {
      end = visible.doc_start ? first_of(first, visible.seqlen, [&](int row) { return visible.document(row) > d; })
                              : visible.seqlen;
      if (!visible.sees_sink_of(end - 1, d) && !last_head.sees_sink_of(end - 1, d)) end = 0;
    }
    Move<int>::copy(end, shared.row_ends[thread]);
  }

  // Over the rows before `end` of the document that key `d` begins. Each group of threads takes every kGroups-th row of
  // the first tile, and every kGroups-th of the later tiles.
  DEVICE static void sum_over_heads(const BackwardParams& params, int batch, int kv_head, int d, int end,
                                    Shared& shared, int thread) {
    const Problem& problem = params.problem;
    const int heads_per_kv = static_cast<int>(problem.heads / problem.kv_heads);
    const int piece = thread % kPieces, group = thread / kPieces;
    SinkSums<Element, 1> sums;
    float lines[4][4] = {};
    for (int head = kv_head * heads_per_kv; head < (kv_head + 1) * heads_per_kv; ++head) {
      const Visibility visible(problem, batch, head);
      const int own_row = d - visible.offset;
      const int begin = first_of(cute::max(own_row, 0), end, [&](int row) { return visible.sees_sink_of(row, d); });
      const int later_tile = own_row < 0 ? 0 : own_row / kRows + 1;  // tiles that see it as the sink before them
      if (piece * 8 < problem.head_dim)
        sum_rows(params, batch, head, begin + group, cute::min(end, later_tile * kRows), piece * 8, sums);
      sum_tiles(params, batch, head, later_tile + group, (end - 1) / kRows, piece, lines);
    }
    CUTE_UNROLL
    for (int line = 0; line < 4; ++line) {
      const float* from = (line < 2 ? sums.dk[0] : sums.dv[0]) + line % 2 * 4;
      alignas(16) float four[4];
      CUTE_UNROLL
      for (int x = 0; x < 4; ++x) four[x] = from[x] + lines[line][x];
      Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(four),
                            reinterpret_cast<uint128_t&>(shared.parts[group][line * kPieces + piece]));
    }
  }

  DEVICE static void sum_rows(const BackwardParams& params, int batch, int head, int row, int end, int column,
                              SinkSums<Element, 1>& sums) {
    const int64_t statistics = (batch * params.problem.heads + head) * params.problem.seqlen;
    const float* weights = static_cast<const float*>(params.sink_weight) + statistics;
    const float* ds = static_cast<const float*>(params.sink_ds) + statistics;
    for (; row < end; row += kGroups)
      sums.add(0, ds[row], Piece(row_of<Element>(params.q, batch, head, row)[column]), weights[row],
               Piece(row_of<Element>(params.dout, batch, head, row)[column]));
  }

  DEVICE static void sum_tiles(const BackwardParams& params, int batch, int head, int tile, int last_tile, int piece,
                               float (&lines)[4][4]) {
    for (; tile <= last_tile; tile += kGroups) {
      const float* from = Lines::of_tile(params, Tiles::row_tile(params.problem, batch, head, tile));
      CUTE_UNROLL
      for (int line = 0; line < 4; ++line) {
        alignas(16) float values[4];
        Move<uint128_t>::copy(reinterpret_cast<const uint128_t&>(from[4 * (line * kPieces + piece)]),
                              reinterpret_cast<uint128_t&>(values));
        CUTE_UNROLL
        for (int x = 0; x < 4; ++x) lines[line][x] += values[x];
      }
    }
  }

  // Four columns of one of the two gradients, a thread.
  DEVICE static void add_to_gradients(const BackwardParams& params, int batch, int kv_head, int d, const Shared& shared,
                                      int thread) {
    const Problem& problem = params.problem;
    const bool of_values = thread >= 2 * kPieces;
    const int column = thread % kPieces * 8 + thread / kPieces % 2 * 4;
    if (column >= problem.head_dim) return;
    float sums[4] = {};
    Lines::template sum<kGroups>(shared.parts[0], thread, sums);
    const float factor = of_values ? 1.0f : static_cast<float>(problem.scale);
    const Element* row = row_of<Element>(of_values ? params.dv : params.dk, batch, kv_head, d);
    Element& first = const_cast<Element&>(row[column]);
    alignas(8) uint32_t pairs[2];
    Move<uint64_t>::copy(reinterpret_cast<const uint64_t&>(first), reinterpret_cast<uint64_t&>(pairs));
    CUTE_UNROLL
    for (int x = 0; x < 2; ++x) {
      const float2 old = unpack2<Element>(pairs[x]);
      pairs[x] = pack2<Element>(old.x + factor * sums[2 * x], old.y + factor * sums[2 * x + 1]);
    }
    Move<uint64_t>::copy(reinterpret_cast<const uint64_t&>(pairs), reinterpret_cast<uint64_t&>(first));
  }
};

}  // namespace longlora::cuda
