// Linked into the parts of a wheel, so that they load beside an older glibc and libstdc++ than those that they are
// built with. A newer GCC's headers ask for symbols that glibc 2.29 and 2.32, and the libstdc++ of GCC 9 to 11, have
// first; here they are, made of older ones. `auditwheel show` tells which a compiler asks for.
#include <exception>
#include <new>
#include <sstream>
#include <string>

// libstdc++'s shared_ptr reads it: 0, there are threads.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// With -Wl,--wrap=pow. The oldest pow also reports errors in another way; it computes the same.
#if defined(__x86_64__)
__asm__(".symver oldest_pow,pow@GLIBC_2.2.5");
#else
__asm__(".symver oldest_pow,pow@GLIBC_2.17");
#endif
extern "C" double oldest_pow(double base, double exponent);
extern "C" __attribute__((visibility("hidden"))) double __wrap_pow(double base, double exponent) {
  return oldest_pow(base, exponent);
}

// What the headers only declare.
template std::ostringstream::basic_ostringstream();
template std::string std::stringbuf::str() const&;

// A copy counts one more owner, and its destructor one fewer; both are older than these two. By their versions, as the
// headers have new ones, which call these two. None of it may be exported (glue.map): libstdc++ would find it.
__asm__(".symver copy_exception,_ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver destroy_exception,_ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");
extern "C" void copy_exception(void* to, const void* from);
extern "C" void destroy_exception(void* owner);

namespace std {

void __throw_bad_array_new_length() { throw bad_array_new_length(); }

void __exception_ptr::exception_ptr::_M_addref() noexcept {
  void* one_more;
  copy_exception(&one_more, this);
}
void __exception_ptr::exception_ptr::_M_release() noexcept { destroy_exception(this); }

}  // namespace std
