/* SPDX-License-Identifier: MIT */
/* Lines to where they are read: see logging.h. */
#include "snapd/daemon/logging.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"

#define KINDS	  64   /* of lines that are counted at a time; others are not limited */
#define LINE_SIZE 4096 /* of what is written: a record has at most 1024 bytes of text */

static const struct {
	const char *name, *id;
} events[LOG_NR_EVENTS] = {
	[LOG_STARTED] = {"started", "30f0baa5fa954dfb9dc38d0ffa08ab74"},
	[LOG_STOPPING] = {"stopping", "71fd7d6d71fa49c48ea1342e94aa93e7"},
	[LOG_VM_READY] = {"vm-ready", "c4185006bd6142ad9e1ecea9642b3c5a"},
	[LOG_VM_LOST] = {"vm-lost", "7c21eed2eed34d44b844b8659933c3e2"},
	[LOG_VM_ENDED] = {"vm-ended", "905322245c7c4f7782f7a5e0f6565c22"},
	[LOG_VM_REFUSED] = {"vm-refused", "a2f3e7a73c7446edb14355e308432753"},
	[LOG_SNAPSHOT_TAKEN] = {"snapshot-taken", "a5522cab0d5d4cc389f1390dc49d8e40"},
	[LOG_SNAPSHOT_FAILED] = {"snapshot-failed", "d8b0974a47ba4e638ca33cf279ffe185"},
	[LOG_ROLLED_BACK] = {"rolled-back", "384c8eef1edf44fca0b3166da853a63e"},
	[LOG_ROLLBACK_FAILED] = {"rollback-failed", "6f5abb47b43e4c4792041ec31b48a6bb"},
	[LOG_RESTORED] = {"restored", "a25565687c3e48b68ae26f1e89108011"},
	[LOG_POST_MORTEM] = {"post-mortem", "a43d349208c24709917d3da57bb92ddb"},
	[LOG_MISSED_PAGES] = {"missed-pages", "3041e645c77346818bd383d7ac9c9a82"},
	[LOG_POLICY_TROUBLE] = {"policy-trouble", "556147e6024f4021af2d493725a59e45"},
	[LOG_POLICY_LEFT_OUT] = {"policy-left-out", "97d1718c6fc24acf91872e7abd802bf6"},
	[LOG_JOB_FAILED] = {"job-failed", "843fa3760a324711907e4438535147e1"},
	[LOG_STORE_DAMAGED] = {"store-damaged", "806b6554d8914be48962e0a0859392e4"},
	[LOG_BACKUP_DAMAGED] = {"backup-damaged", "2c4cb564c12a81ac0a5d9b971b9e8369"},
	[LOG_SCRUBBED] = {"scrubbed", "b3cb0eb6943846079bfa908cdb7afd99"},
	[LOG_STORE_FILLING] = {"store-filling", "747df0bdc7304931bd47b80bfd316ebc"},
	[LOG_STORE_IN_DOUBT] = {"store-in-doubt", "577c6b3acdc9431590cb0737953100f7"},
};

static const char *const level_names[] = {
	[LOG_LVL_ERR] = "err",	 [LOG_LVL_WARN] = "warning", [LOG_LVL_NOTICE] = "notice",
	[LOG_LVL_INFO] = "info", [LOG_LVL_DEBUG] = "debug",
};

/* A kind of line in the window that it opened. */
struct kind {
	const char *format; /* NULL: free */
	char vm[64];
	enum log_level level;
	uint64_t until_ns; /* CLOCK_MONOTONIC */
	uint32_t seen;
	char text[160]; /* of the last that was not written */
};

static struct {
	enum log_format format;
	int journal_fd; /* -1: none */
	struct sockaddr_un journal;
	pthread_mutex_t lock;
	struct kind kinds[KINDS]; /* lock */
} out = {.journal_fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER};

const char *logging_message_id(enum log_event event)
{
	return events[event].id;
}

const char *logging_event_name(enum log_event event)
{
	return events[event].name;
}

static uint64_t monotonic_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* ---- a record as bytes ---- */

struct line {
	char b[LINE_SIZE];
	size_t len;
};

static void __attribute__((format(printf, 2, 3))) add(struct line *l, const char *fmt, ...)
{
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(l->b + l->len, sizeof(l->b) - l->len, fmt, ap);
	va_end(ap);
	if (n > 0)
		l->len = MIN(l->len + (size_t)n, sizeof(l->b) - 1);
}

/* No value has a newline, which is all that would need another form. */
static void to_journal(const struct log_record *r, struct line *l)
{
	add(l, "MESSAGE=%s\nPRIORITY=%d\nSYSLOG_IDENTIFIER=snapd\n", r->text, r->level);
	if (r->event)
		add(l, "MESSAGE_ID=%s\n", events[r->event].id);
	if (r->about.vm && *r->about.vm)
		add(l, "SNAPD_VM=%s\n", r->about.vm);
	if (r->about.policy)
		add(l, "SNAPD_POLICY=%s\n", r->about.policy);
	if (r->about.job)
		add(l, "SNAPD_JOB=%llu\n", (unsigned long long)r->about.job);
	if (r->about.snapshot)
		add(l, "SNAPD_SNAPSHOT=%llu\n", (unsigned long long)r->about.snapshot);
}

/* The text in quotes, for logfmt as for JSON, which is to be UTF-8: other bytes become '?'. */
static void add_quoted(struct line *l, const char *s)
{
	add(l, "\"");
	for (; *s && l->len + 3 < sizeof(l->b); s++) {
		if (*s == '"' || *s == '\\')
			l->b[l->len++] = '\\';
		l->b[l->len++] = (char)((unsigned char)*s < 0x80 ? *s : '?');
	}
	add(l, "\"");
}

static void add_text_field(struct line *l, bool json, const char *key, const char *value)
{
	if (!value || !*value)
		return;
	add(l, json ? ",\"%s\":" : " %s=", key);
	add_quoted(l, value);
}

static void add_number_field(struct line *l, bool json, const char *key, uint64_t value)
{
	if (value)
		add(l, json ? ",\"%s\":%llu" : " %s=%llu", key, (unsigned long long)value);
}

static void to_fields(const struct log_record *r, struct line *l, bool json)
{
	struct timespec now;
	char second[32];
	struct tm tm;

	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &tm);
	strftime(second, sizeof(second), "%FT%T", &tm);
	add(l, json ? "{\"time\":\"%s.%06ldZ\"" : "time=%s.%06ldZ", second, now.tv_nsec / 1000);
	add(l, json ? ",\"level\":\"%s\",\"msg\":" : " level=%s msg=", level_names[r->level]);
	add_quoted(l, r->text);
	add_text_field(l, json, "event", events[r->event].name);
	add_text_field(l, json, "vm", r->about.vm);
	add_text_field(l, json, "policy", r->about.policy);
	add_number_field(l, json, "job", r->about.job);
	add_number_field(l, json, "snapshot", r->about.snapshot);
	add(l, json ? "}\n" : "\n");
}

/* One write a line, so that lines of several threads do not mix. */
static void emit(const struct log_record *r)
{
	struct line l = {.len = 0};

	if (out.format == LOG_FORMAT_JOURNAL) {
		to_journal(r, &l);
		if (sendto(out.journal_fd, l.b, l.len, MSG_NOSIGNAL | MSG_DONTWAIT,
			   (struct sockaddr *)&out.journal, sizeof(out.journal)) >= 0)
			return;
		/* It is being restarted, or does not read: stderr is its, too. */
		l.len = 0;
	}
	if (out.format == LOG_FORMAT_LOGFMT || out.format == LOG_FORMAT_JSON)
		to_fields(r, &l, out.format == LOG_FORMAT_JSON);
	else if (out.format == LOG_FORMAT_JOURNAL)
		add(&l, "<%d>%s\n", r->level, r->text);
	else
		add(&l, "%s\n", r->text);
	(void)!write(STDERR_FILENO, l.b, l.len);
}

/* ---- too much of a kind ---- */

/* A window is over: say how many were left out.  Under the lock. */
static void close_window(struct kind *k)
{
	uint32_t left_out = k->seen > LOGGING_BURST ? k->seen - LOGGING_BURST : 0;
	char text[256];
	struct log_record r = {.level = k->level, .format = "", .text = text};

	k->format = NULL;
	if (!left_out)
		return;
	r.about.vm = *k->vm ? k->vm : NULL;
	snprintf(text, sizeof(text), "%u more like: %s", left_out, k->text);
	emit(&r);
}

static bool is_of(const struct kind *k, const struct log_record *r)
{
	return k->format == r->format && !strcmp(k->vm, r->about.vm ? r->about.vm : "");
}

/* The kind of this record, in its window or a new one; NULL: all are taken.  Under the lock. */
static struct kind *find_kind(const struct log_record *r, uint64_t now_ns)
{
	struct kind *free_one = NULL;

	for (size_t i = 0; i < KINDS; i++) {
		struct kind *k = &out.kinds[i];

		if (k->format && now_ns >= k->until_ns)
			close_window(k);
		if (!k->format)
			free_one = k;
		else if (is_of(k, r))
			return k;
	}
	if (!free_one)
		return NULL;
	*free_one = (struct kind){.format = r->format,
				  .level = r->level,
				  .until_ns = now_ns + LOGGING_WINDOW_S * 1000000000ull};
	snprintf(free_one->vm, sizeof(free_one->vm), "%s", r->about.vm ? r->about.vm : "");
	return free_one;
}

static bool may_pass(const struct log_record *r)
{
	bool pass = true;
	struct kind *k;

	if (r->level >= LOG_LVL_DEBUG)
		return true;
	pthread_mutex_lock(&out.lock);
	k = find_kind(r, monotonic_ns());
	if (k && ++k->seen > LOGGING_BURST) {
		snprintf(k->text, sizeof(k->text), "%s", r->text);
		pass = false;
	}
	pthread_mutex_unlock(&out.lock);
	return pass;
}

static void write_record(const struct log_record *r)
{
	if (may_pass(r))
		emit(r);
}

/* ---- start and end ---- */

/* Is stderr the stream that the service manager connected to the journal? */
static bool is_journal(int fd)
{
	const char *stream = getenv("JOURNAL_STREAM");
	unsigned long long dev, ino;
	struct stat st;

	return stream && sscanf(stream, "%llu:%llu", &dev, &ino) == 2 && !fstat(fd, &st) &&
	       st.st_dev == dev && st.st_ino == ino;
}

static bool open_journal(const char *path)
{
	out.journal = (struct sockaddr_un){.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof(out.journal.sun_path) || access(path, W_OK))
		return false;
	memcpy(out.journal.sun_path, path, strlen(path) + 1);
	out.journal_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	return out.journal_fd >= 0;
}

void logging_start(enum log_format format, const char *journal_socket)
{
	if (format == LOG_FORMAT_AUTO)
		format = is_journal(STDERR_FILENO) ? LOG_FORMAT_JOURNAL : LOG_FORMAT_TEXT;
	if (format == LOG_FORMAT_JOURNAL && !open_journal(journal_socket) &&
	    !is_journal(STDERR_FILENO))
		format = LOG_FORMAT_TEXT;
	out.format = format;
	log_set_writer(write_record);
}

void logging_stop(void)
{
	log_set_writer(NULL);
	pthread_mutex_lock(&out.lock);
	for (size_t i = 0; i < KINDS; i++)
		if (out.kinds[i].format)
			close_window(&out.kinds[i]);
	pthread_mutex_unlock(&out.lock);
	if (out.journal_fd >= 0)
		close(out.journal_fd);
	out.journal_fd = -1;
}
