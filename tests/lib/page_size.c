/* SPDX-License-Identifier: MIT */
/*
 * page_size: a host whose pages are FA_PAGE bytes, as far as the service can tell:
 * its sysconf() comes before the C library's.  mmap() still works in the real pages,
 * of which FA_PAGE is a multiple.  Compiled into a program, or preloaded into one.
 */
#include <dlfcn.h>
#include <unistd.h>

#include "tests/lib/fake_agent.h"

long sysconf(int name)
{
	static long (*real)(int);

	if (name == _SC_PAGESIZE)
		return FA_PAGE;
	if (!real)
		real = (long (*)(int))dlsym(RTLD_NEXT, "sysconf");
	return real(name);
}
