/* SPDX-License-Identifier: MIT */
/* SIGBUS → -EFAULT for the thread that asked for it; see busguard.h. */
#include "snapd/util/busguard.h"

#include <assert.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

static _Thread_local sigjmp_buf *volatile guard;

static void on_sigbus(int sig)
{
	if (guard)
		siglongjmp(*guard, 1);
	/* Not ours: the instruction faults again, with the default action. */
	signal(sig, SIG_DFL);
}

int busguard_install(void)
{
	/* NODEFER: siglongjmp() restores no mask, so SIGBUS must not be blocked. */
	struct sigaction sa = {.sa_handler = on_sigbus, .sa_flags = SA_NODEFER};

	sigemptyset(&sa.sa_mask);
	return sigaction(SIGBUS, &sa, NULL) ? -errno : 0;
}

int busguard_run(void (*fn)(void *arg), void *arg)
{
	sigjmp_buf env;

	assert(!guard);
	if (sigsetjmp(env, 0)) {
		guard = NULL;
		return -EFAULT;
	}
	guard = &env;
	fn(arg);
	guard = NULL;
	return 0;
}
