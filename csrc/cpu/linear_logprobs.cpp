// The LM head on CPU: statistics and gradients of hidden . weight^T without the [N, U] logits.
//
// Logits exist as tiles [kTileRows of the vocabulary][kBlock tokens] that fit a core's own cache; tokens lie across lanes, so that
// the online softmax (arXiv:1805.02867) needs no horizontal step, and a tile of gradients is at once the right-hand operand of the
// GEMM for d hidden. The backward pass recomputes the logits (arXiv:2411.09009) by superblocks of the vocabulary: the gradients of
// one superblock for all tokens are kept in the inputs' dtype, and one GEMM over all of them gives those rows of d weight in their
// final form, so that no float32 copy of the whole matrix is needed.
//
// Every sum has a fixed order: over the vocabulary by tiles, splits and superblocks of fixed sizes, over H and tokens ascending.
// Threads share out outputs, never a sum. A token's lane never sees another's: its results depend neither on the other
// tokens nor on its place.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

namespace skyrl_mega {

constexpr int64_t kBlock = 64;        // tokens of a tile: 4 vectors of AVX-512
constexpr int64_t kTileRows = 192;    // vocabulary rows of a tile: 48 KiB of logits
constexpr int64_t kSuperRows = 1152;  // rows of a superblock: 6 tiles; its gradients take kSuperRows * N elements
constexpr int64_t kSplitRows = 64 * kTileRows;  // rows of a split: what one thread sums in the forward pass
constexpr int64_t kGroupBlocks = 32;  // blocks of tokens that a tile of weights meets before the next tile is read
constexpr int64_t kWeightRows = 96;   // rows of d weight made at a time: 24 KiB per 64 columns
constexpr int64_t kGemmWords = 640;   // contracted words per partial sum, at most: 160 KiB of the right-hand operand

// Per token of a block; a, b and c come divided by the temperature. Lanes without a token: lse = inf, a = b = c = 0.
struct BlockCoefficients {
  float lse[kBlock], a[kBlock], b[kBlock], c[kBlock];
};

enum class Write { float32, add_float32, bfloat16 };

}  // namespace skyrl_mega

#define SKYRL_MEGA_KERNELS "linear_logprobs_kernels.h"
#include "for_each_isa.h"

namespace skyrl_mega {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out[column * out_stride + row] = in[row * in_stride + column]; strides in elements.
template <typename T>
void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  constexpr int64_t kPiece = 16;  // columns at a time: one cache line of each row stays at hand
  for (int64_t column = 0; column < columns; column += kPiece)
    for (int64_t c = column; c < std::min(column + kPiece, columns); c++)
      for (int64_t row = 0; row < rows; row++) out[c * out_stride + row] = in[row * in_stride + c];
}

// One call's inputs. Scalar: float, or uint16_t for the bits of bfloat16.
template <typename Scalar>
struct Head {
  static constexpr bool kBf16 = sizeof(Scalar) == 2;
  static constexpr int64_t kPerWord = 4 / sizeof(Scalar);

  int64_t num_rows, width, num_columns;  // N, H, U
  int64_t blocks, tiles, words;          // words: 32-bit words of a row of hidden or weight, the last one padded
  int64_t weight_stride;                 // elements
  float inverse_temperature;
  float cap;  // of tempered logits: the soft cap over the temperature; 0: none
  Tensor weight_storage, bias_storage, floor_storage;
  const Scalar *hidden, *weight;
  const float *bias, *floor;  // null where there is none; floor is padded to whole blocks
  const int64_t* columns;

  Head(const Tensor& hidden_NH, const Tensor& weight_UH, const OptionalTensor& bias_U, const Tensor& columns_N,
       const OptionalTensor& floor_N, double temperature, double softcap)
      : num_rows(hidden_NH.size(0)), width(hidden_NH.size(1)), num_columns(weight_UH.size(0)),
        blocks(ceil_div(num_rows, kBlock)), tiles(ceil_div(num_columns, kTileRows)), words(ceil_div(width, kPerWord)),
        weight_stride(words * kPerWord), inverse_temperature(static_cast<float>(1.0 / temperature)),
        cap(static_cast<float>(softcap / temperature)),
        // A word of two bfloat16 must not reach into the next row.
        weight_storage(weight_stride == width ? weight_UH : at::constant_pad_nd(weight_UH, {0, weight_stride - width})),
        hidden(static_cast<const Scalar*>(hidden_NH.const_data_ptr())),
        weight(static_cast<const Scalar*>(weight_storage.const_data_ptr())), bias(nullptr), floor(nullptr),
        columns(columns_N.const_data_ptr<int64_t>()) {
    if (bias_U) {
      bias_storage = bias_U->to(at::kFloat).mul(inverse_temperature);
      bias = bias_storage.const_data_ptr<float>();
    }
    if (floor_N) {
      floor_storage = at::full({blocks * kBlock}, kInfinity, at::kFloat);
      std::copy_n(floor_N->const_data_ptr<float>(), num_rows, floor_storage.template mutable_data_ptr<float>());
      floor = floor_storage.const_data_ptr<float>();
    }
  }

  int64_t block_rows(int64_t block) const { return std::min(kBlock, num_rows - block * kBlock); }
  int64_t tile_rows(int64_t tile) const { return std::min(kTileRows, num_columns - tile * kTileRows); }
  const float* block_floor(int64_t block) const { return floor ? floor + block * kBlock : nullptr; }

  // The label's row in a tile for each token of a block, -1 where it lies elsewhere.
  void label_rows(int64_t block, int64_t tile, int32_t* out) const {
    const int64_t first = tile * kTileRows, rows = tile_rows(tile), tokens = block_rows(block);
    for (int64_t token = 0; token < kBlock; token++) {
      const int64_t row = token < tokens ? columns[block * kBlock + token] - first : -1;
      out[token] = row >= 0 && row < rows ? static_cast<int32_t>(row) : -1;
    }
  }

  // hidden as the right-hand operand of the logits' GEMM: per block [words][kBlock], zeros beyond N and H.
  Tensor hidden_by_words() const {
    Tensor out = at::empty({blocks, words, kBlock}, at::kInt);
    Scalar* to = static_cast<Scalar*>(out.mutable_data_ptr());
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        Scalar* panel = to + block * words * kBlock * kPerWord;
        if (block_rows(block) < kBlock || words * kPerWord != width) std::fill_n(panel, words * kBlock * kPerWord, Scalar(0));
        for (int64_t token = 0; token < block_rows(block); token++) {
          const Scalar* row = hidden + (block * kBlock + token) * width;
          for (int64_t h = 0; h < width; h++)
            panel[h / kPerWord * kBlock * kPerWord + token * kPerWord + h % kPerWord] = row[h];
        }
      }
    });
    return out;
  }

  // hidden as the right-hand operand of d weight's GEMM: per kBlock of H, [words of tokens][kBlock], zeros beyond N and H.
  Tensor hidden_by_tokens() const {
    const int64_t token_words = blocks * kBlock / kPerWord, panels = ceil_div(width, kBlock);
    Tensor out = at::empty({panels, token_words, kBlock}, at::kInt);
    Scalar* to = static_cast<Scalar*>(out.mutable_data_ptr());
    at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++)
        for (int64_t token = 0; token < blocks * kBlock; token++) {
          Scalar* place = to + (panel * token_words + token / kPerWord) * kBlock * kPerWord + token % kPerWord;
          const int64_t valid = token < num_rows ? std::min(kBlock, width - panel * kBlock) : 0;
          const Scalar* row = hidden + token * width + panel * kBlock;
          for (int64_t h = 0; h < kBlock; h++) place[h * kPerWord] = h < valid ? row[h] : Scalar(0);
        }
    });
    return out;
  }

  // Logits of one tile: (hidden . weight^T + bias) / temperature, capped.
  void logits(int64_t block, int64_t tile, const int32_t* hidden_words, float* out) const {
    const int64_t first = tile * kTileRows, rows = tile_rows(tile);
    SKYRL_MEGA_DISPATCH(gemm_tile, (kBf16, weight + first * weight_stride, weight_stride * sizeof(Scalar),
                                    hidden_words + block * words * kBlock, out, rows, words, false, inverse_temperature));
    if (bias) SKYRL_MEGA_DISPATCH(add_bias, (out, rows, bias + first));
    if (cap > 0) SKYRL_MEGA_DISPATCH(cap_tile, (out, rows, cap));
  }
};

// ---- Statistics ----

// Moves sums relative to old_max to new_max; nothing was summed where old_max is -inf.
void merge_statistics(const float* from, int64_t from_stride, float* into, int64_t into_stride) {
  const float new_max = std::max(into[0], from[0]);
  if (std::isnan(from[1]) || new_max > -kInfinity) {
    float sum = 0, shifted = 0;
    for (const auto& [max, s, x] : {std::tuple(into[0], into[into_stride], into[2 * into_stride]),
                                    std::tuple(from[0], from[from_stride], from[2 * from_stride])}) {
      const float moved = max == -kInfinity ? 0 : max - new_max, scale = max == -kInfinity && !std::isnan(s) ? 0 : std::exp(moved);
      sum += s * scale;
      shifted += (x + moved * s) * scale;
    }
    into[0] = new_max;
    into[into_stride] = sum;
    into[2 * into_stride] = shifted;
  }
  into[3 * into_stride] += from[3 * from_stride];  // at most one holds the label; the others hold 0
}

template <typename Scalar>
std::tuple<Tensor, Tensor, Tensor> statistics_of(const Head<Scalar>& head, float* workspace, bool with_entropy, int64_t top_k) {
  const int64_t splits = ceil_div(head.num_columns, kSplitRows), groups = ceil_div(head.blocks, kGroupBlocks);
  const int64_t tokens = head.blocks * kBlock;
  const Tensor words = head.hidden_by_words();
  const int32_t* hidden_words = words.template const_data_ptr<int32_t>();
  Tensor partial = at::full({splits, head.blocks, 4, kBlock}, 0, at::kFloat);
  partial.select(2, 0).fill_(-kInfinity);
  float* partials = partial.mutable_data_ptr<float>();
  Tensor best = at::full({splits, tokens, top_k}, -kInfinity, at::kFloat), where = at::full({splits, tokens, top_k}, -1, at::kLong);
  float* best_logits = best.mutable_data_ptr<float>();
  int64_t* best_columns = where.mutable_data_ptr<int64_t>();

  at::parallel_for(0, splits * groups, 1, [&](int64_t begin, int64_t end) {
    alignas(64) static thread_local float scratch[kTileRows * kBlock];
    int32_t labels[kBlock];
    for (int64_t item = begin; item < end; item++) {
      const int64_t split = item / groups, group = item % groups;
      for (int64_t tile = split * kSplitRows / kTileRows; tile < std::min((split + 1) * kSplitRows / kTileRows, head.tiles); tile++)
        for (int64_t block = group * kGroupBlocks; block < std::min((group + 1) * kGroupBlocks, head.blocks); block++) {
          float* logits = workspace ? workspace + (tile * head.blocks + block) * kTileRows * kBlock : scratch;
          const int64_t place = split * head.blocks + block, rows = head.tile_rows(tile);
          head.logits(block, tile, hidden_words, logits);
          head.label_rows(block, tile, labels);
          SKYRL_MEGA_DISPATCH(reduce_tile, (logits, rows, with_entropy, head.block_floor(block), labels,
                                            partials + place * 4 * kBlock));
          if (top_k > 0)
            SKYRL_MEGA_DISPATCH(update_topk, (logits, rows, tile * kTileRows, top_k,
                                              best_logits + place * kBlock * top_k, best_columns + place * kBlock * top_k));
        }
    }
  });

  Tensor packed_4N = at::empty({4, head.num_rows}, at::kFloat);
  float* packed = packed_4N.mutable_data_ptr<float>();
  for (int64_t token = 0; token < head.num_rows; token++) {
    const float* first = partials + token / kBlock * 4 * kBlock + token % kBlock;
    for (int64_t row = 0; row < 4; row++) packed[row * head.num_rows + token] = first[row * kBlock];
    for (int64_t split = 1; split < splits; split++)
      merge_statistics(first + split * head.blocks * 4 * kBlock, kBlock, packed + token, head.num_rows);
  }
  if (top_k == 0) return {packed_4N, Tensor(), Tensor()};

  Tensor logits_NK = at::empty({head.num_rows, top_k}, at::kFloat), columns_NK = at::empty({head.num_rows, top_k}, at::kLong);
  float* out_logits = logits_NK.mutable_data_ptr<float>();
  int64_t* out_columns = columns_NK.mutable_data_ptr<int64_t>();
  std::vector<int64_t> next(splits);
  for (int64_t token = 0; token < head.num_rows; token++) {
    std::fill(next.begin(), next.end(), 0);
    for (int64_t k = 0; k < top_k; k++) {  // the earlier split wins a tie: it has the lower columns
      int64_t winner = 0, from = 0;
      for (int64_t split = 0; split < splits; split++) {
        const int64_t candidate = (split * tokens + token) * top_k + std::min(next[split], top_k - 1);
        if (split == 0 || best_logits[candidate] > best_logits[from]) {
          winner = split;
          from = candidate;
        }
      }
      next[winner]++;
      out_logits[token * top_k + k] = best_logits[from];
      out_columns[token * top_k + k] = best_columns[from];
    }
  }
  return {packed_4N, logits_NK, columns_NK};
}

// ---- Gradients ----

template <typename Scalar>
std::vector<BlockCoefficients> by_blocks(const Head<Scalar>& head, const Tensor& lse_N, const Tensor& coefficients_3N) {
  const float *lse = lse_N.const_data_ptr<float>(), *abc = coefficients_3N.const_data_ptr<float>();
  std::vector<BlockCoefficients> out(head.blocks);
  for (int64_t token = 0; token < head.blocks * kBlock; token++) {
    BlockCoefficients& block = out[token / kBlock];
    const int64_t lane = token % kBlock;
    const bool valid = token < head.num_rows;
    block.lse[lane] = valid ? lse[token] : kInfinity;
    block.a[lane] = valid ? abc[token] * head.inverse_temperature : 0;
    block.b[lane] = valid ? abc[head.num_rows + token] * head.inverse_temperature : 0;
    block.c[lane] = valid ? abc[2 * head.num_rows + token] * head.inverse_temperature : 0;
  }
  return out;
}

template <typename Scalar>
void gradients_of(const Head<Scalar>& head, float* workspace, const Tensor& lse_N, const Tensor& coefficients_3N,
                  const OptionalTensor& grad_hidden, const OptionalTensor& grad_weight, const OptionalTensor& grad_bias,
                  bool accumulate) {
  constexpr bool kBf16 = Head<Scalar>::kBf16;
  constexpr int64_t kPerWord = Head<Scalar>::kPerWord;
  const int64_t width = head.width, blocks = head.blocks, panels = ceil_div(width, kBlock);
  const int64_t super_rows = std::min(kSuperRows, head.tiles * kTileRows);
  const int64_t token_words = blocks * kBlock / kPerWord;
  // One cache line more than the tokens need: rows a power of two apart would share the same few sets of the cache.
  const int64_t kept_stride = blocks * kBlock * sizeof(Scalar) + 64;
  const bool keep = grad_weight || grad_bias;
  const float inverse_cap = head.cap > 0 ? 1 / head.cap : 0;

  const std::vector<BlockCoefficients> coefficients = by_blocks(head, lse_N, coefficients_3N);
  const float* slopes = coefficients_3N.const_data_ptr<float>() + head.num_rows;
  const bool with_slope = std::any_of(slopes, slopes + head.num_rows, [](float b) { return b != 0; });

  const auto bytes = [](int64_t count) { return at::empty({count}, at::kByte); };
  const Tensor words = workspace ? Tensor() : head.hidden_by_words();
  const int32_t* hidden_words = workspace ? nullptr : words.template const_data_ptr<int32_t>();
  const Tensor by_tokens = grad_weight ? head.hidden_by_tokens() : Tensor();
  const Tensor kept_storage = bytes(keep ? super_rows * kept_stride : 0);
  char* kept = static_cast<char*>(kept_storage.mutable_data_ptr());
  const Tensor transposed_storage = bytes(grad_hidden ? super_rows * width * sizeof(Scalar) : 0);
  Scalar* transposed = static_cast<Scalar*>(transposed_storage.mutable_data_ptr());  // per tile [H][kTileRows]
  const Tensor hidden_storage = at::empty({grad_hidden ? blocks : 0, width, kBlock}, at::kFloat);
  float* hidden_sums = hidden_storage.mutable_data_ptr<float>();

  for (int64_t first_tile = 0; first_tile < head.tiles; first_tile += kSuperRows / kTileRows) {
    const int64_t tiles = std::min(kSuperRows / kTileRows, head.tiles - first_tile);
    if (grad_hidden)
      at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
          Scalar* out = transposed + t * kTileRows * width;
          const int64_t rows = head.tile_rows(first_tile + t);
          transpose(head.weight + (first_tile + t) * kTileRows * head.weight_stride, head.weight_stride, rows, width, out, kTileRows);
          if (rows % kPerWord != 0)
            for (int64_t h = 0; h < width; h++) out[h * kTileRows + rows] = 0;
        }
      });
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      alignas(64) static thread_local float scratch[kTileRows * kBlock];
      alignas(64) static thread_local uint32_t pairs[kTileRows / 2 * kBlock];
      int32_t labels[kBlock];
      for (int64_t block = begin; block < end; block++)
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t tile = first_tile + t, rows = head.tile_rows(tile);
          float* logits = workspace ? workspace + (tile * blocks + block) * kTileRows * kBlock : scratch;
          if (!workspace) head.logits(block, tile, hidden_words, logits);
          head.label_rows(block, tile, labels);
          char* kept_tile = keep ? kept + t * kTileRows * kept_stride + block * kBlock * sizeof(Scalar) : nullptr;
          SKYRL_MEGA_DISPATCH(gradient_tile, (kBf16, logits, rows, coefficients[block], with_slope,
                                              head.block_floor(block), labels, inverse_cap, pairs, kept_tile, kept_stride));
          if (grad_hidden)
            SKYRL_MEGA_DISPATCH(gemm_tile, (kBf16, transposed + t * kTileRows * width, kTileRows * sizeof(Scalar),
                                            kBf16 ? static_cast<const void*>(pairs) : logits, hidden_sums + block * width * kBlock,
                                            width, ceil_div(rows, kPerWord), tile > 0, 1.0f));
        }
    });
    if (!keep) continue;

    const int64_t first_row = first_tile * kTileRows, rows = std::min(kSuperRows, head.num_columns - first_row);
    at::parallel_for(0, ceil_div(rows, kWeightRows), 1, [&](int64_t begin, int64_t end) {
      alignas(64) static thread_local float result[kWeightRows * kBlock];
      for (int64_t piece = begin; piece < end; piece++) {
        const int64_t row = piece * kWeightRows, count = std::min(kWeightRows, rows - row);
        const char* kept_rows = kept + row * kept_stride;
        for (int64_t panel = 0; grad_weight && panel < panels; panel++) {
          SKYRL_MEGA_DISPATCH(gemm_tile, (kBf16, kept_rows, kept_stride,
                                          by_tokens.template const_data_ptr<int32_t>() + panel * token_words * kBlock, result, count,
                                          token_words, false, 1.0f));
          const bool narrow = grad_weight->scalar_type() == at::kBFloat16;
          const Write how = narrow ? Write::bfloat16 : accumulate ? Write::add_float32 : Write::float32;
          char* out = static_cast<char*>(grad_weight->mutable_data_ptr());
          out += ((first_row + row) * width + panel * kBlock) * (narrow ? 2 : 4);
          SKYRL_MEGA_DISPATCH(write_rows, (how, result, count, std::min(kBlock, width - panel * kBlock), out, width));
        }
        for (int64_t r = 0; grad_bias && r < count; r++) {
          const float sum = SKYRL_MEGA_DISPATCH(sum_row, (kBf16, kept_rows + r * kept_stride, blocks * kBlock));
          float& out = grad_bias->mutable_data_ptr<float>()[first_row + row + r];
          out = accumulate ? out + sum : sum;
        }
      }
    });
  }
  if (!grad_hidden) return;
  float* out = grad_hidden->mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      transpose(hidden_sums + block * width * kBlock, kBlock, width, head.block_rows(block), out + block * kBlock * width, width);
  });
}

// ---- Operators ----

void check_inputs(const Tensor& hidden_NH, const Tensor& weight_UH) {
  TORCH_CHECK(hidden_NH.dim() == 2 && weight_UH.dim() == 2 && hidden_NH.size(1) == weight_UH.size(1) && hidden_NH.numel() > 0 &&
                  weight_UH.numel() > 0,
              "hidden must be [N, H] and weight [U, H], none of them empty; got ", hidden_NH.sizes(), " and ", weight_UH.sizes(), ".");
  TORCH_CHECK(hidden_NH.is_contiguous() && weight_UH.is_contiguous(), "hidden and weight must be contiguous.");
  TORCH_CHECK(hidden_NH.scalar_type() == weight_UH.scalar_type() &&
                  (hidden_NH.scalar_type() == at::kFloat || hidden_NH.scalar_type() == at::kBFloat16),
              "hidden and weight must both be float32 or bfloat16; got ", hidden_NH.scalar_type(), " and ", weight_UH.scalar_type(), ".");
}

void check_vector(const char* name, const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.scalar_type() == dtype && tensor.sizes() == sizes && tensor.is_contiguous(), name, " must be contiguous ", dtype,
              " ", sizes, "; got ", tensor.scalar_type(), " ", tensor.sizes(), ".");
}

template <typename Scalar>
Head<Scalar> checked_head(const Tensor& hidden_NH, const Tensor& weight_UH, const OptionalTensor& bias_U, const Tensor& columns_N,
                          const OptionalTensor& floor_N, double temperature, double softcap) {
  const int64_t num_rows = hidden_NH.size(0);
  check_vector("columns", columns_N, at::kLong, {num_rows});
  if (bias_U) check_vector("bias", *bias_U, weight_UH.scalar_type(), {weight_UH.size(0)});
  if (floor_N) check_vector("floor", *floor_N, at::kFloat, {num_rows});
  TORCH_CHECK(softcap >= 0, "softcap (", softcap, ") must be positive, or 0 for none.");
  return Head<Scalar>(hidden_NH, weight_UH, bias_U, columns_N, floor_N, temperature, softcap);
}

int64_t workspace_size(int64_t num_rows, int64_t num_columns) {
  return ceil_div(num_rows, kBlock) * kBlock * ceil_div(num_columns, kTileRows) * kTileRows;
}

float* checked_workspace(const Tensor& workspace, const Tensor& hidden_CH, const Tensor& weight_UH) {
  const int64_t needed = workspace_size(hidden_CH.size(0), weight_UH.size(0));
  TORCH_CHECK(workspace.scalar_type() == at::kFloat && workspace.is_contiguous() && workspace.numel() >= needed,
              "workspace must be contiguous float32 with at least ", needed, " elements; got ", workspace.scalar_type(), " ",
              workspace.numel(), ".");
  return workspace.mutable_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& hidden_NH, const Tensor& weight_UH, const OptionalTensor& bias_U,
                                              const Tensor& columns_N, const OptionalTensor& floor_N, double temperature,
                                              double softcap, bool with_entropy, int64_t top_k) {
  check_inputs(hidden_NH, weight_UH);
  TORCH_CHECK(top_k >= 0, "top_k (", top_k, ") must not be negative.");
  const auto run = [&](auto scalar) {
    return statistics_of(checked_head<decltype(scalar)>(hidden_NH, weight_UH, bias_U, columns_N, floor_N, temperature, softcap),
                         nullptr, with_entropy, top_k);
  };
  auto [packed_4N, logits_NK, columns_NK] = hidden_NH.scalar_type() == at::kFloat ? run(float()) : run(uint16_t());
  if (top_k == 0) return {packed_4N, at::empty({0}, at::kFloat), at::empty({0}, at::kLong)};
  return {packed_4N, logits_NK, columns_NK};
}

Tensor chunk_statistics(const Tensor& hidden_CH, const Tensor& weight_UH, const OptionalTensor& bias_U, const Tensor& columns_C,
                        const OptionalTensor& floor_C, const Tensor& workspace, double temperature, double softcap,
                        bool with_entropy) {
  check_inputs(hidden_CH, weight_UH);
  float* logits = checked_workspace(workspace, hidden_CH, weight_UH);
  const auto run = [&](auto scalar) {
    return statistics_of(checked_head<decltype(scalar)>(hidden_CH, weight_UH, bias_U, columns_C, floor_C, temperature, softcap),
                         logits, with_entropy, 0);
  };
  return std::get<0>(hidden_CH.scalar_type() == at::kFloat ? run(float()) : run(uint16_t()));
}

void check_gradients(const Tensor& hidden_NH, const Tensor& weight_UH, const Tensor& lse_N, const Tensor& coefficients_3N,
                     const OptionalTensor& grad_hidden_NH, const OptionalTensor& grad_weight_UH, const OptionalTensor& grad_bias_U,
                     bool accumulate) {
  check_inputs(hidden_NH, weight_UH);
  check_vector("lse", lse_N, at::kFloat, {hidden_NH.size(0)});
  check_vector("coefficients", coefficients_3N, at::kFloat, {3, hidden_NH.size(0)});
  if (grad_hidden_NH) check_vector("grad_hidden", *grad_hidden_NH, at::kFloat, hidden_NH.sizes());
  if (grad_bias_U) check_vector("grad_bias", *grad_bias_U, at::kFloat, {weight_UH.size(0)});
  if (!grad_weight_UH) return;
  const bool own_dtype = grad_weight_UH->scalar_type() == weight_UH.scalar_type() && !accumulate;
  check_vector("grad_weight", *grad_weight_UH, own_dtype ? weight_UH.scalar_type() : at::kFloat, weight_UH.sizes());
}

void gradients(const Tensor& hidden_NH, const Tensor& weight_UH, const OptionalTensor& bias_U, const Tensor& columns_N,
               const OptionalTensor& floor_N, const Tensor& lse_N, const Tensor& coefficients_3N, double temperature,
               double softcap, const OptionalTensor& grad_hidden_NH, const OptionalTensor& grad_weight_UH, const OptionalTensor& grad_bias_U,
               bool accumulate) {
  check_gradients(hidden_NH, weight_UH, lse_N, coefficients_3N, grad_hidden_NH, grad_weight_UH, grad_bias_U, accumulate);
  const auto run = [&](auto scalar) {
    gradients_of(checked_head<decltype(scalar)>(hidden_NH, weight_UH, bias_U, columns_N, floor_N, temperature, softcap), nullptr,
                 lse_N, coefficients_3N, grad_hidden_NH, grad_weight_UH, grad_bias_U, accumulate);
  };
  hidden_NH.scalar_type() == at::kFloat ? run(float()) : run(uint16_t());
}

void chunk_gradients(const Tensor& hidden_CH, const Tensor& weight_UH, const Tensor& columns_C, const OptionalTensor& floor_C,
                     const Tensor& lse_C, const Tensor& coefficients_3C, const Tensor& workspace, double temperature,
                     double softcap, const OptionalTensor& grad_hidden_CH, const OptionalTensor& grad_weight_UH, const OptionalTensor& grad_bias_U) {
  check_gradients(hidden_CH, weight_UH, lse_C, coefficients_3C, grad_hidden_CH, grad_weight_UH, grad_bias_U, true);
  float* logits = checked_workspace(workspace, hidden_CH, weight_UH);
  const auto run = [&](auto scalar) {
    gradients_of(checked_head<decltype(scalar)>(hidden_CH, weight_UH, std::nullopt, columns_C, floor_C, temperature, softcap), logits,
                 lse_C, coefficients_3C, grad_hidden_CH, grad_weight_UH, grad_bias_U, true);
  };
  hidden_CH.scalar_type() == at::kFloat ? run(float()) : run(uint16_t());
}

}  // namespace
}  // namespace skyrl_mega

TORCH_LIBRARY_FRAGMENT(skyrl_mega_cpu, library) {
  library.def(
      "linear_logprobs_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor columns, Tensor? floor, float temperature, "
      "float softcap, bool with_entropy, int top_k) -> (Tensor, Tensor, Tensor)");
  library.def(
      "linear_logprobs_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor columns, Tensor? floor, Tensor lse, "
      "Tensor coefficients, float temperature, float softcap, Tensor(a!)? grad_hidden, Tensor(b!)? grad_weight, "
      "Tensor(c!)? grad_bias, bool accumulate) -> ()");
  library.def("linear_logprobs_workspace_size(int num_rows, int num_columns) -> int", &skyrl_mega::workspace_size);
  library.def(
      "linear_logprobs_chunk_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor columns, Tensor? floor, "
      "Tensor(a!) workspace, float temperature, float softcap, bool with_entropy) -> Tensor");
  library.def(
      "linear_logprobs_chunk_gradients(Tensor hidden, Tensor weight, Tensor columns, Tensor? floor, Tensor lse, "
      "Tensor coefficients, Tensor(a!) workspace, float temperature, float softcap, Tensor(b!)? grad_hidden, "
      "Tensor(c!)? grad_weight, Tensor(d!)? grad_bias) -> ()");
}

TORCH_LIBRARY_IMPL(skyrl_mega_cpu, CPU, library) {
  library.impl("linear_logprobs_statistics", &skyrl_mega::statistics);
  library.impl("linear_logprobs_gradients", &skyrl_mega::gradients);
  library.impl("linear_logprobs_chunk_statistics", &skyrl_mega::chunk_statistics);
  library.impl("linear_logprobs_chunk_gradients", &skyrl_mega::chunk_gradients);
}
