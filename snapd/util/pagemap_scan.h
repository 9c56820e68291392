/* SPDX-License-Identifier: MIT */
/*
 * pagemap_scan: the kernel's interface for finding written pages of a mapping
 * (Documentation/admin-guide/mm/pagemap.rst, "Pagemap Scan IOCTL", Linux 6.7) and the
 * features of userfaultfd it needs, for C libraries whose headers are older.
 */
#pragma once

#include <linux/fs.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

#ifndef PAGEMAP_SCAN
struct page_region {
	uint64_t start, end; /* addresses */
	uint64_t categories;
};

struct pm_scan_arg {
	uint64_t size; /* of this struct */
	uint64_t flags;
	uint64_t start, end;
	uint64_t walk_end; /* out: where it stopped */
	uint64_t vec;	   /* struct page_region [vec_len] */
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN	      _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_WRITTEN	      (1 << 1)
#define PM_SCAN_WP_MATCHING   (1 << 0) /* protect what is reported */
#define PM_SCAN_CHECK_WPASYNC (1 << 1) /* -EPERM where the mapping is not registered */
#endif
