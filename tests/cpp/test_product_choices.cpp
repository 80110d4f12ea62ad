// Guards bench/results/product-choices.txt: what config.cpp chooses, on an H100, for the products whose time
// bench/cuda_account.py models. An H200 has as many SMs and as much shared memory, so it gets the same.
//
//     qln_test_product_choices FILE    compares the file with the choices
//     qln_test_product_choices         prints them, for `make sass ARGS=--output`
#include <cstdint>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <variant>

#include "common/layout.h"
#include "expect.h"
#include "product/config.h"

namespace qlora_native {
namespace {

constexpr int kNumSms = 132;
constexpr std::size_t kSmem = 227 * 1024, kReservedSmem = 1024;  // bytes
constexpr std::int64_t kRank = 16;
constexpr std::int64_t kLowRankTile = 64;  // rows of U or V in a tile (kProductTile)

std::ostream& operator<<(std::ostream& text, const GeneralConfig&) { return text << "general"; }
std::ostream& operator<<(std::ostream& text, const GemvConfig& config) {
  return text << "gemv blocks=" << config.blocks;
}
std::ostream& write_runs(std::ostream& text, const char* kernel, const GemmConfig& config) {
  return text << kernel << " tile_rows=" << config.tile_rows << " tile_cols=" << config.tile_cols
              << " tiles=" << config.tiles << " steps=" << config.steps << " blocks=" << config.blocks
              << " share=" << config.share << " rest=" << config.rest;
}
std::ostream& operator<<(std::ostream& text, const GemmConfig& config) {
  return write_runs(text, config.thin ? "thin" : "gemm", config);
}
std::ostream& operator<<(std::ostream& text, const HopperConfig& config) {
  return write_runs(text, "wgmma", config.gemm) << " cluster=" << config.cluster << (config.pairs ? " pairs=1" : "");
}
std::ostream& operator<<(std::ostream& text, const PanelsConfig& config) {
  return text << "panels cols=" << config.cols << " rows=" << config.rows;
}

// A line for each product, and for what it is asked: which way it takes where there is a dense product, which one it
// takes where there is none, without wgmma, with it, and with each of its tiles; which panels it would have without
// wgmma; and how the sums of U or V are split.
std::string all_choices() {
  std::ostringstream text;
  for (const auto& [n, k] :
       {std::pair{4096, 4096}, std::pair{14336, 4096}, std::pair{4096, 14336}, std::pair{1024, 4096}}) {
    for (std::int64_t rows = 16; rows <= 8192; rows *= 2) {
      for (const bool backward : {false, true}) {
        ProductShape shape = {.rows = rows,
                              .cols = backward ? k : n,
                              .inner = backward ? n : k,
                              .dtype = DType::bf16,
                              .backward = backward,
                              .aligned = true,
                              .aligned_64 = true,
                              .tma_can_load = true,
                              .num_sms = kNumSms,
                              .smem_bytes = kSmem,
                              .reserved_smem_bytes = kReservedSmem};
        const auto begin_line = [&](const char* asked) -> std::ostream& {
          return text << (backward ? "dX" : "forward") << ' ' << shape.rows << ' ' << shape.cols << ' ' << shape.inner
                      << ' ' << asked << ' ';
        };
        const auto add = [&](const char* asked, std::int64_t rank, bool dense_gemm, HopperUse hopper) {
          shape.rank = rank;
          shape.dense_gemm = dense_gemm;
          shape.hopper = hopper;
          std::visit([&](const auto& way) { begin_line(asked) << way << '\n'; }, product_config(shape));
        };
        add("mma.sync", 0, false, HopperUse::none);
        add("wgmma", 0, false, HopperUse::wherever_it_can);
        for (const int tile_rows : {16, 32, 64, 128, 256}) {
          shape.hopper_rows = tile_rows;
          add(("wgmma-" + std::to_string(tile_rows)).c_str(), 0, false, HopperUse::wherever_it_can);
        }
        shape.hopper_rows = 0;
        add("dense", 0, true, HopperUse::none);
        add("dense-with-adapter", kRank, true, HopperUse::none);
        add("chosen", 0, true, HopperUse::where_it_wins);
        add("chosen-with-adapter", kRank, true, HopperUse::where_it_wins);
        const LowRankSplit split = low_rank_split(ceil_div(rows, kLowRankTile), shape.inner, kNumSms);
        begin_line("low-rank") << "split parts=" << split.parts << " length=" << split.length << '\n';
      }
    }
  }
  return text.str();
}

}  // namespace
}  // namespace qlora_native

int main(int argc, char** argv) {
  const std::string choices = qlora_native::all_choices();
  if (argc < 2) {
    std::cout << choices;
    return 0;
  }
  std::ostringstream committed;
  committed << std::ifstream(argv[1]).rdbuf();
  EXPECT(committed.str() == choices);
  return report();
}
