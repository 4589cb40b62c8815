// Tells ThreadSanitizer what OpenMP promises: what came before a parallel region happens before each thread's share of
// it, and all shares happen before what comes after. libgomp is not instrumented and waits by futex, so without this
// every region would look like a race. Preloaded; between the threads of one region nothing is promised, and a race is
// seen.
#include <dlfcn.h>

extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
}

namespace {

struct Region {
  void (*body)(void*);
  void* data;
  long begin = 0, end = 0;  // their addresses are what is released and acquired
};

void run_share(void* context) {
  auto* region = static_cast<Region*>(context);
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

}  // namespace

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  static const auto libgomps = reinterpret_cast<decltype(&GOMP_parallel)>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{body, data};
  __tsan_release(&region.begin);
  libgomps(run_share, &region, threads, flags);
  __tsan_acquire(&region.end);
}
