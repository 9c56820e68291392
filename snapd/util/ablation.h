/* SPDX-License-Identifier: MIT */
/*
 * ablation: guards that a test can take away, to see that something then notices.  Only
 * test programs are built with SNAPD_ABLATIONS; anywhere else ABLATED() is 0 and nothing
 * of this is left.
 */
#pragma once

enum ablation {
	ABLATION_NONE,
	ABLATION_AS_ID_IGNORED,		/* an entry's address space is not looked at */
	ABLATION_ID_REUSED_AT_ONCE,	/* kernel slot ids do not wait for a pass */
	ABLATION_ALIAS_IS_ANOTHER_PAGE, /* each slot makes pieces of its own */
	ABLATION_GONE_KEEPS_BITS,	/* unplugged memory stays in the sets */
	ABLATION_BACKUP_BEFORE_STATE,	/* backup bitmaps are read before state is saved */
	ABLATION_BACKUP_GOES_WITH_SLOT, /* and not before their slot is deleted */
	ABLATION_LOG_BEFORE_QUIESCE,	/* device logs are read before devices stop */
	ABLATION_LOG_AFTER_SLOT_CHANGE, /* and after what is at a GPA has changed */
	ABLATION_LOG_NOT_EXCHANGED,	/* read, then cleared */
	ABLATION_CONSUMERS_SHARE,	/* one bit for all: who takes it takes everyone's */
	ABLATION_NEWCOMER_CLEAN,	/* a new consumer has nothing to look at */
	ABLATION_DISCARD_UNTOLD,	/* memory is given back, and nobody is told */
	ABLATION_SUSPECTS_FORGOTTEN,	/* a RESET cut short is taken for a whole one */
	NR_ABLATIONS
};

#ifdef SNAPD_ABLATIONS
extern enum ablation snapd_ablation; /* the test's; set before anything else runs */
#define ABLATED(what) (snapd_ablation == ABLATION_##what)
#else
#define ABLATED(what) 0
#endif
