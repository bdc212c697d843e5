// Batch normalization, ReLU fused, by oneDNN 2 as Debian has it (apt-get install libdnnl-dev): the peer `onednn` of
// `normkit bench`. src/normkit/benchmarking/peers/onednn.py compiles it to a library of C functions and calls them:
//
//   c++ -std=c++17 -O2 -shared -fPIC benchmarks/onednn.cpp -o onednn.so -ldnnl
//
// A step is forward and backward in training, with the running statistics, or forward by given statistics. What it
// returns lies in memory that it uses again, as that of the copy does.
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <string>
#include <unordered_map>

#include <oneapi/dnnl/dnnl.hpp>

namespace {

using dnnl::memory;
using Arguments = std::unordered_map<int, memory>;

constexpr float kRate = 0.1f;  // of the running statistics, as in the other peers

std::string said;  // what the last error was

memory::desc described(const int64_t* shape, int axes, bool last, memory::data_type type) {
  using tag = memory::format_tag;
  const std::map<int, tag> plain = {{2, tag::nc}, {3, tag::ncw}, {4, tag::nchw}, {5, tag::ncdhw}};
  const std::map<int, tag> channels_last = {{3, tag::nwc}, {4, tag::nhwc}, {5, tag::ndhwc}};
  return {memory::dims(shape, shape + axes), type, (last ? channels_last : plain).at(axes)};
}

}  // namespace

struct Step {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<std::string, memory> tensors;  // by the names of normkit.benchmarking.values
  dnnl::batch_normalization_forward forward;
  dnnl::batch_normalization_backward backward;
  Arguments to_forward, to_backward;
  std::string kernel;
  std::size_t channels = 0, count = 0;
  bool training = false;

  Step(const int64_t* shape, int axes, bool last, bool half, bool relu, bool train, float eps) : training(train) {
    using flag = dnnl::normalization_flags;
    const auto data = described(shape, axes, last, half ? memory::data_type::bf16 : memory::data_type::f32);
    const memory::desc row({shape[1]}, memory::data_type::f32, memory::format_tag::a);
    channels = static_cast<std::size_t>(shape[1]);
    count = 1;
    for (int axis = 0; axis < axes; ++axis) count *= axis == 1 ? 1 : static_cast<std::size_t>(shape[axis]);

    auto flags = flag::use_scale | flag::use_shift;
    if (relu) flags |= flag::fuse_norm_relu;
    if (!training) flags |= flag::use_global_stats;
    const auto kind = training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference;
    const dnnl::batch_normalization_forward::primitive_desc ahead({kind, data, eps, flags}, engine);
    forward = dnnl::batch_normalization_forward(ahead);
    kernel = ahead.impl_info_str();

    auto made = [&](const char* name, const memory::desc& what) {
      return tensors.emplace(name, memory(what, engine)).first->second;
    };
    const memory x = made("x", data), gamma = made("gamma", row), beta = made("beta", row);
    const memory running_mean = made("mean", row), running_var = made("var", row);
    const memory mean = training ? memory(row, engine) : running_mean;
    const memory var = training ? memory(row, engine) : running_var;
    to_forward = {{DNNL_ARG_SRC, x},     {DNNL_ARG_SCALE, gamma}, {DNNL_ARG_SHIFT, beta}, {DNNL_ARG_MEAN, mean},
                  {DNNL_ARG_VARIANCE, var}, {DNNL_ARG_DST, made("y", data)}};
    if (!training) return;

    const memory signs(ahead.workspace_desc(), engine);  // of ReLU's input
    if (relu) to_forward.emplace(DNNL_ARG_WORKSPACE, signs);
    const dnnl::batch_normalization_backward::primitive_desc back(
        {dnnl::prop_kind::backward, data, data, eps, flags}, engine, ahead);
    backward = dnnl::batch_normalization_backward(back);
    kernel += std::string(" ") + back.impl_info_str();
    to_backward = to_forward;
    to_backward.erase(DNNL_ARG_DST);
    to_backward.insert({{DNNL_ARG_DIFF_DST, made("dy", data)},
                        {DNNL_ARG_DIFF_SRC, made("dx", data)},
                        {DNNL_ARG_DIFF_SCALE, made("dgamma", row)},
                        {DNNL_ARG_DIFF_SHIFT, made("dbeta", row)}});
  }

  void run() {
    forward.execute(stream, to_forward);
    if (training) {
      keep("mean", DNNL_ARG_MEAN, 1.0f);
      keep("var", DNNL_ARG_VARIANCE, static_cast<float>(count) / static_cast<float>(count - 1));
      backward.execute(stream, to_backward);
    }
    stream.wait();
  }

  void keep(const char* name, int from, float factor) {
    auto* kept = static_cast<float*>(tensors.at(name).get_data_handle());
    const auto* found = static_cast<const float*>(to_forward.at(from).get_data_handle());
    for (std::size_t c = 0; c < channels; ++c) kept[c] += kRate * (factor * found[c] - kept[c]);
  }
};

// 0, or a null pointer, is an error; onednn_error says which.
extern "C" {

const char* onednn_error() { return said.c_str(); }

Step* onednn_begin(const int64_t* shape, int axes, int last, int half, int relu, int training, float eps) {
  try {
    return new Step(shape, axes, last != 0, half != 0, relu != 0, training != 0, eps);
  } catch (const std::exception& error) {
    said = error.what();
    return nullptr;
  }
}

void* onednn_tensor(Step* step, const char* name) { return step->tensors.at(name).get_data_handle(); }

const char* onednn_kernel(Step* step) { return step->kernel.c_str(); }

int onednn_run(Step* step) {
  try {
    step->run();
    return 1;
  } catch (const std::exception& error) {
    said = error.what();
    return 0;
  }
}

void onednn_end(Step* step) { delete step; }
}
