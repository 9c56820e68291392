/* SPDX-License-Identifier: MIT */
/*
 * busguard: touch memory that somebody else may take away.
 *
 * Guest RAM and the dirty sets are files of the VMM; it may truncate them, or a
 * memory limit may be hit while a page is filled in, and then every access here
 * raises SIGBUS.  Code between enter and leave is copied out of by siglongjmp()
 * instead, so it must own nothing: no lock, no allocation, no other cleanup.
 *
 *   err = busguard_run(fn, arg);   0, or -EFAULT: fn stopped somewhere in the middle
 *
 * Per thread; does not nest.  One sigsetjmp() without a system call for each run,
 * so a run should be a batch and not a page.
 */
#pragma once

/* Install the SIGBUS handler; once, before the first thread. */
int busguard_install(void);
int busguard_run(void (*fn)(void *arg), void *arg);
