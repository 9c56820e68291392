/* SPDX-License-Identifier: MIT */
/*
 * s3_errors: what an answer that is no success means.  In: its status and error document;
 * out: -errno, whether to try again, and one line that says what to do.  Pure.
 */
#pragma once

#include "snapd/backup/s3_http.h"

/* The answer has status 300 or more; sets its failure and `again`.  Neither -EEXIST nor
 * -ENOENT counts as a failure. */
int s3_explain(const struct objstore *s, const struct s3_request *q, struct s3_answer *a,
	       struct err *e);
