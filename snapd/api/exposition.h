/* SPDX-License-Identifier: MIT */
/*
 * exposition: the Prometheus text format (version 0.0.4), a metric at a time: its family, then
 * all of its samples.  Names are ours and constant; values of labels are escaped here.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "snapd/vm/figures.h"

#define LABELS_MAX 512

enum metric_type { METRIC_COUNTER, METRIC_GAUGE, METRIC_SUMMARY, METRIC_HISTOGRAM };

void metric_family(FILE *f, const char *name, enum metric_type type, const char *help);

/* "a", "x", "b", "y", NULL → a="x",b="y"; returns buf. */
char *metric_labels(char buf[LABELS_MAX], ...) __attribute__((sentinel));

/* `labels` as metric_labels() makes them, "" none. */
void metric_u64(FILE *f, const char *name, const char *labels, uint64_t value);
void metric_double(FILE *f, const char *name, const char *labels, double value);
/* Nanoseconds, shown in seconds. */
void metric_seconds(FILE *f, const char *name, const char *labels, uint64_t ns);
/* All lines of a histogram; `seconds`: bounds and sum are nanoseconds. */
void metric_histogram(FILE *f, const char *name, const char *labels, const struct histogram *h,
		      const uint64_t bounds[HISTOGRAM_BOUNDS], bool seconds);
