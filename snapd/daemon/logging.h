/* SPDX-License-Identifier: MIT */
/*
 * logging: lines of util/log.h to where they are read, from any thread.
 *
 *   journal   native fields over the journal's socket: MESSAGE, PRIORITY, MESSAGE_ID of events,
 *             SNAPD_VM, SNAPD_JOB, SNAPD_SNAPSHOT, SNAPD_POLICY
 *   text      the line as it is, on stderr
 *   logfmt    time=… level=… msg="…" vm=… job=… snapshot=… policy=… event=…
 *   json      the same as an object
 *   auto      journal when stderr is the journal's (JOURNAL_STREAM names it), else text
 *
 * Lines of one kind (one format) about one VM: after LOGGING_BURST within LOGGING_WINDOW_S the
 * rest of the window is counted, and the count is logged.  Debug lines are not limited.
 */
#pragma once

#include <stdint.h>

#include "snapd/util/log.h"

#define LOGGING_BURST	 50
#define LOGGING_WINDOW_S 10
#define JOURNAL_SOCKET	 "/run/systemd/journal/socket"

enum log_format {
	LOG_FORMAT_AUTO,
	LOG_FORMAT_JOURNAL,
	LOG_FORMAT_TEXT,
	LOG_FORMAT_LOGFMT,
	LOG_FORMAT_JSON,
};

/* From now on; before other threads.  Falls back to text when there is no journal. */
void logging_start(enum log_format format, const char *journal_socket);
/* What was counted is logged. */
void logging_stop(void);

/* 32 hexadecimal digits; NULL for LOG_NO_EVENT. */
const char *logging_message_id(enum log_event event);
const char *logging_event_name(enum log_event event);
