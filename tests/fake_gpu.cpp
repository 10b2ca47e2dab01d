// A CUDA device without CUDA, for torch's CPU build; see fake_gpu.py.
//
// Its memory is the host's. A tensor of it says that it is on cuda:0, and every operator for which
// torch has no kernel of its own for such a tensor comes here: it is computed by the CPU's kernel
// on an alias, a tensor of the CPU over the same memory.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

namespace {

using at::Tensor;
using Alias = std::pair<Tensor, Tensor>;                     // of the GPU, of the CPU
using Storages = std::map<c10::StorageImpl*, c10::Storage>;  // the GPU's: the CPU's over its memory

const c10::Device CPU(c10::kCPU), GPU(c10::kCUDA, 0);

// --- Memory: what nobody has written yet is NaN ------------------------------------------------

int64_t allocated = 0, peak = 0, limit = 0;  // bytes
std::recursive_mutex lock;
std::map<const char*, size_t> pinned;

void* filled(size_t bytes) {
  void* memory = nullptr;
  if (bytes) TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "no memory");
  if (bytes) std::memset(memory, 0xff, bytes);
  return memory;
}

struct GpuAllocator final : c10::Allocator {
  struct Block {
    void* memory;
    size_t bytes;
  };
  static void release(void* context) {
    std::lock_guard guard(lock);
    auto* block = static_cast<Block*>(context);
    allocated -= block->bytes;
    free(block->memory);
    delete block;
  }
  c10::DataPtr allocate(size_t bytes) override {
    std::lock_guard guard(lock);
    TORCH_CHECK_WITH(OutOfMemoryError, allocated + int64_t(bytes) <= limit,
                     "CUDA out of memory. Tried to allocate ", bytes, " bytes beside ", allocated);
    peak = std::max(peak, allocated += bytes);
    auto* block = new Block{filled(bytes), bytes};
    return {block->memory, block, &release, GPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
} gpu_memory;

struct PinnedAllocator final : c10::Allocator {
  static void release(void* memory) {
    std::lock_guard guard(lock);
    pinned.erase(static_cast<char*>(memory));
    free(memory);
  }
  c10::DataPtr allocate(size_t bytes) override {
    std::lock_guard guard(lock);
    void* memory = filled(bytes);
    if (memory) pinned[static_cast<char*>(memory)] = bytes;
    return {memory, memory, &release, CPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
} pinned_memory;

// Memory of the GPU that begins as `from` does.
c10::DataPtr on_gpu(const c10::StorageImpl& from, size_t bytes) {
  auto data = gpu_memory.allocate(bytes);
  if (auto kept = std::min(bytes, from.nbytes())) memcpy(data.get(), from.data(), kept);
  return data;
}

void give(c10::StorageImpl& storage, const c10::StorageImpl& from, size_t bytes) {
  auto data = on_gpu(from, bytes);
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(bytes);
}

bool is_pinned(const void* address) {
  std::lock_guard guard(lock);
  auto next = pinned.upper_bound(static_cast<const char*>(address));
  return next != pinned.begin() && address < std::prev(next)->first + std::prev(next)->second;
}

// --- Time: copies from and to pinned memory are under way until somebody waits -----------------

struct Copy {
  int64_t number;
  bool to_host;
  Tensor host, value;
};
std::vector<Copy> under_way;
int64_t launched = 0;
bool may_wait = true;

void wait_until(int64_t number) {
  std::vector<Copy> done;
  {
    std::lock_guard guard(lock);
    auto later = [number](const Copy& copy) { return copy.number <= number; };
    auto end = std::stable_partition(under_way.begin(), under_way.end(), later);
    done.assign(under_way.begin(), end);
    under_way.erase(under_way.begin(), end);
  }
  for (auto& copy : done) {
    if (copy.to_host)
      copy.host.copy_(copy.value);
    else
      TORCH_CHECK(!memcmp(copy.host.data_ptr(), copy.value.data_ptr(), copy.host.nbytes()),
                  "pinned memory was written to while it was copied to the GPU");
  }
}

void host_waits(const std::string& what) {
  TORCH_CHECK(may_wait, what, " waits for the GPU");
  wait_until(launched);
}

// --- Operators ---------------------------------------------------------------------------------

Tensor random_state = at::detail::createCPUGenerator().get_state();

// The CPU's kernels draw from its default generator: it is the GPU's while one of them runs.
void with_own_random_numbers(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto generator = at::detail::getDefaultCPUGenerator();
  auto theirs = generator.get_state();
  generator.set_state(random_state);
  op.callBoxed(stack);
  random_state = generator.get_state();
  generator.set_state(theirs);
}

c10::Storage over_memory_of(c10::StorageImpl* gpu, Storages& storages) {
  auto found = storages.find(gpu);
  if (found == storages.end()) {
    c10::Storage cpu(c10::Storage::use_byte_size_t(), gpu->nbytes(),
                     c10::DataPtr(gpu->mutable_data(), CPU), c10::GetAllocator(c10::kCPU), true);
    found = storages.emplace(gpu, std::move(cpu)).first;
  }
  return found->second;
}

void take_shape(const Tensor& tensor, const Tensor& of) {
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(of.sizes(), of.strides(),
                                                      of.storage_offset());
}

Tensor alias_of(const Tensor& tensor, Storages& storages) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      over_memory_of(tensor.storage().unsafeGetStorageImpl(), storages),
      c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  take_shape(alias, tensor);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
    alias.unsafeGetTensorImpl()->set_wrapped_number(true);
  return alias;
}

// What an operator returned, as the GPU's: an argument, a view of one, or new memory.
Tensor as_the_gpus(const Tensor& result, const std::vector<Alias>& arguments) {
  if (!result.defined()) return result;
  auto* storage = result.storage().unsafeGetStorageImpl();
  for (auto& [gpu, cpu] : arguments)
    if (cpu.is_same(result)) return gpu;
  for (auto& [gpu, cpu] : arguments)
    if (cpu.storage().unsafeGetStorageImpl() == storage) {
      auto view = at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, c10::Storage(gpu.storage()), gpu.key_set(), result.dtype());
      take_shape(view, result);
      return view;
    }
  c10::Storage own(c10::Storage::use_byte_size_t(), storage->nbytes(),
                   on_gpu(*storage, storage->nbytes()), &gpu_memory, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(own), c10::DispatchKeySet(c10::DispatchKey::CUDA), result.dtype());
  take_shape(made, result);
  return made;
}

// An argument that an operator has resized or given another storage.
void write_back(const Alias& argument, const Storages& storages) {
  auto& [gpu, cpu] = argument;
  auto *own = gpu.storage().unsafeGetStorageImpl(), *now = cpu.storage().unsafeGetStorageImpl();
  for (auto& [other, alias] : storages)
    if (other != own && alias.unsafeGetStorageImpl() == now)
      gpu.unsafeGetTensorImpl()->set_storage_keep_dtype(
          c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(other)));
  if (gpu.storage().unsafeGetStorageImpl() == own && now->data() != own->data())
    give(*own, *now, now->nbytes());
  if (gpu.sizes() != cpu.sizes() || gpu.strides() != cpu.strides()) take_shape(gpu, cpu);
}

// `each` of the tensors in `value`, however deep in lists.
template <typename F>
void for_tensors(c10::IValue& value, F each) {
  if (value.isTensor()) {
    value = each(value.toTensor());
  } else if (value.isTensorList()) {
    std::vector<Tensor> list;
    for (Tensor tensor : value.toTensorList()) list.push_back(each(tensor));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (std::optional<Tensor> one : value.toOptionalTensorList())
      list.push_back(one ? std::optional<Tensor>(each(*one)) : std::nullopt);
    value = list;
  } else if (value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList()) {
    c10::List<std::vector<Tensor>> lists;
    for (auto& inner : value.toListRef()) {
      std::vector<Tensor> list;
      for (Tensor tensor : inner.toTensorList()) list.push_back(each(tensor));
      lists.push_back(list);
    }
    value = lists;
  }
}

// A tensor of the GPU may be indexed by one of the CPU, not the other way round.
const std::set<std::string> MAY_MIX = {"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                       "aten::set_"};
const std::set<std::string> ARE_READ = {
    "aten::_local_scalar_dense", "aten::equal",    "aten::is_nonzero", "aten::nonzero",
    "aten::masked_select",       "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const bool is_collective = name.rfind("c10d::", 0) == 0;
  Storages storages;
  std::vector<Alias> arguments;
  std::vector<Tensor> of_the_cpu;
  bool stays = true;
  const size_t first = stack->size() - schema.arguments().size();
  const bool leads = (*stack)[first].isTensor() && (*stack)[first].toTensor().is_cuda();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    auto& value = (*stack)[first + i];
    const auto& argument = schema.arguments()[i].name();
    for_tensors(value, [&](const Tensor& tensor) {
      auto alias = alias_of(tensor, storages);
      if (tensor.defined() && tensor.is_cuda())
        arguments.emplace_back(tensor, alias);
      else if (tensor.defined() && tensor.dim())
        of_the_cpu.push_back(tensor);
      return alias;
    });
    if (value.isStorage() && value.toStorage().device() == GPU)
      value = over_memory_of(value.toStorage().unsafeGetStorageImpl(), storages);
    else if (value.isDevice() && !(stays = value.toDevice().is_cuda()))
      continue;
    else if (value.isDevice())
      value = CPU;
    else if (argument == "pin_memory")
      value = false;
    else if (argument == "generator")
      TORCH_CHECK(value.isNone(), "a generator of the CPU for a tensor of the GPU");
  }
  TORCH_CHECK(
      arguments.empty() || of_the_cpu.empty() || is_collective || (leads && MAY_MIX.count(name)),
      "Expected all tensors to be on the same device, but ", name, " got cuda:0 and cpu");
  if (ARE_READ.count(name)) host_waits(name);
  if (op.hasTag(at::Tag::nondeterministic_seeded))
    with_own_random_numbers(op, stack);
  else
    op.callBoxed(stack);
  if (is_collective)  // gloo may still be at it when this returns
    for (auto& each : arguments) static_cast<void>(new Tensor(each.first));
  for (auto& each : arguments) write_back(each, storages);
  if (!stays) return;
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    for_tensors((*stack)[i], [&](const Tensor& result) { return as_the_gpus(result, arguments); });
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  Storages storages;
  auto target = alias_of(to, storages), source = alias_of(from, storages);
  if (from.is_cuda() && !to.is_cuda() && non_blocking && is_pinned(to.data_ptr())) {
    auto value = at::empty(to.sizes(), target.options().pinned_memory(false)).copy_(source);
    std::lock_guard guard(lock);
    if (to.is_non_overlapping_and_dense())
      memset(to.data_ptr(), 0x7f, to.nbytes());  // for who reads too early
    under_way.push_back({++launched, true, to.detach(), value});
    return to;
  }
  const bool crosses = from.is_cuda() != to.is_cuda();
  if (crosses && (!non_blocking || from.is_cuda()))
    host_waits(from.is_cuda() ? "a copy from the GPU" : "a blocking copy to the GPU");
  target.copy_(source);
  if (to.is_cuda() && !from.is_cuda() && non_blocking && is_pinned(from.data_ptr()) &&
      from.is_contiguous()) {
    auto value = at::empty(from.sizes(), from.options().pinned_memory(false)).copy_(from);
    std::lock_guard guard(lock);
    under_way.push_back({++launched, false, from.detach(), value});
  }
  return to;
}

// --- What torch asks of a device ---------------------------------------------------------------

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {  // one stream
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, GPU);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Timer final : c10d::Timer {  // of DDP
  explicit Timer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};

const Guard guard;

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::CUDAHooks)
}
namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, ::Timer)
}
static c10::impl::DeviceGuardImplRegistrar registered(c10::kCUDA, &guard);

const auto by_the_cpu_of_all = torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>;

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(by_the_cpu_of_all()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", TORCH_FN(copy_));
  // Their kernels for any device want more of it than this one has.
  for (auto* name : {"native_layer_norm", "native_dropout", "native_dropout_backward",
                     "embedding_dense_backward"})
    m.impl(name, by_the_cpu_of_all());
}

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {  // what the group "cpu:gloo,cuda:gloo" does, as NCCL would
  for (auto* name :
       {"broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_",
        "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "barrier"})
    m.impl(name, by_the_cpu_of_all());
}

TORCH_LIBRARY(fake_gpu, m) {
  c10::SetAllocator(c10::kCUDA, &gpu_memory, 255);
  m.def("launched", []() -> int64_t { return launched; });
  m.def("wait_until", [](int64_t number) { wait_until(number); });
  m.def("may_wait", [](bool may) { may_wait = may; });
  m.def("allocated", []() -> int64_t { return allocated; });
  m.def("peak", []() -> int64_t { return peak; });
  m.def("reset_peak", [] { peak = allocated; });
  m.def("limit", [](int64_t bytes) { limit = bytes; });
  m.def("resize_storage", [](const Tensor& over, int64_t bytes) {
    auto& storage = *over.storage().unsafeGetStorageImpl();
    give(storage, storage, bytes);
  });
  m.def("get_state", []() -> Tensor { return random_state.clone(); });
  m.def("set_state", [](const Tensor& state) { random_state = state.clone(); });
  m.def("seed",
        [](int64_t seed) { random_state = at::detail::createCPUGenerator(seed).get_state(); });
}
