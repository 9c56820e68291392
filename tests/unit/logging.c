/* SPDX-License-Identifier: MIT */
/*
 * Goal: each line arrives whole in each form, with what it is about; a flood of one kind is cut to
 * a number and the rest counted; every event has an id of its own that the catalog explains.
 *
 * Method: stderr is a pipe, the journal a socket of ours.  Usage: logging CATALOG
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <jansson.h>

#include "snapd/daemon/logging.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

static int pipe_fd[2], journal_fd, real_stderr;
static char text[256 << 10];

static size_t take(int fd)
{
	ssize_t n = read(fd, text, sizeof(text) - 1);

	text[MAX(n, (ssize_t)0)] = '\0';
	return (size_t)MAX(n, (ssize_t)0);
}

static void has(const char *want)
{
	if (!strstr(text, want))
		dup2(real_stderr, STDERR_FILENO);
	check(strstr(text, want), "no '%s' in:\n%s", want, text);
}

static void is_without(const char *unwanted)
{
	check(!strstr(text, unwanted), "'%s' in:\n%s", unwanted, text);
}

static void one_line(void)
{
	*log_about() =
		(struct log_about){.vm = "web", .policy = "fast", .job = 7, .snapshot = 1ull << 40};
	log_event(LOG_SNAPSHOT_FAILED, LOG_LVL_WARN, "web: \"quoted\\ \n and \xff two lines");
	*log_about() = (struct log_about){0};
}

static void journal(void)
{
	logging_start(LOG_FORMAT_JOURNAL, "journal.sock");
	one_line();
	check(take(journal_fd), "nothing in the journal");
	has("MESSAGE=web: \"quoted\\   and \xff two lines\n");
	has("PRIORITY=4\nSYSLOG_IDENTIFIER=snapd\nMESSAGE_ID=d8b0974a47ba4e638ca33cf279ffe185\n");
	has("SNAPD_VM=web\nSNAPD_POLICY=fast\nSNAPD_JOB=7\nSNAPD_SNAPSHOT=1099511627776\n");
	log_info("about nothing");
	take(journal_fd);
	check(!strcmp(text, "MESSAGE=about nothing\nPRIORITY=6\nSYSLOG_IDENTIFIER=snapd\n"), "%s",
	      text);
	/* The journal goes: nothing is lost. */
	unlink("journal.sock");
	log_err("still here");
	take(pipe_fd[0]);
	check(!strcmp(text, "<3>still here\n"), "%s", text);
	logging_stop();
}

/* auto: the journal if and only if stderr is the stream that it names. */
static void automatic(void)
{
	char stream[64];
	struct stat st;

	check(!fstat(STDERR_FILENO, &st), "fstat");
	snprintf(stream, sizeof(stream), "%llu:%llu", (unsigned long long)st.st_dev,
		 (unsigned long long)st.st_ino);
	setenv("JOURNAL_STREAM", stream, 1);
	logging_start(LOG_FORMAT_AUTO, "journal.sock");
	log_info("one");
	check(take(journal_fd), "it is the journal's, and was not asked");
	logging_stop();
	setenv("JOURNAL_STREAM", "1:1", 1);
	logging_start(LOG_FORMAT_AUTO, "journal.sock");
	log_info("two");
	take(pipe_fd[0]);
	check(!strcmp(text, "two\n"), "%s", text);
	logging_stop();
	unsetenv("JOURNAL_STREAM");
}

static void fields(void)
{
	json_t *o;

	logging_start(LOG_FORMAT_LOGFMT, "");
	one_line();
	take(pipe_fd[0]);
	has("Z level=warning msg=\"web: \\\"quoted\\\\   and ? two lines\" "
	    "event=\"snapshot-failed\" "
	    "vm=\"web\" policy=\"fast\" job=7 snapshot=1099511627776\n");
	check(strchr(text, '\n') == text + strlen(text) - 1, "more than a line");
	logging_stop();
	logging_start(LOG_FORMAT_JSON, "");
	one_line();
	take(pipe_fd[0]);
	o = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
	check(o && json_integer_value(json_object_get(o, "snapshot")) == 1ll << 40 &&
		      !strcmp(json_string_value(json_object_get(o, "vm")), "web") &&
		      !strcmp(json_string_value(json_object_get(o, "level")), "warning"),
	      "%s", text);
	json_decref(o);
	log_set_level(LOG_LVL_WARN);
	log_info("too much");
	log_warn("%04000d", 7);
	take(pipe_fd[0]);
	is_without("too much");
	o = json_loads(text, JSON_REJECT_DUPLICATES, NULL);
	check(o && json_string_length(json_object_get(o, "msg")) > 900, "a long line is not whole");
	json_decref(o);
	log_set_level(LOG_LVL_INFO);
	logging_stop();
}

static void *flood(void *arg)
{
	log_about()->vm = arg;
	for (int i = 0; i < 500; i++)
		log_warn("%s breaks, %d", (char *)arg, i);
	return NULL;
}

static void floods(void)
{
	static char names[2][4] = {"db", "web"};
	pthread_t threads[2];
	int lines = 0;

	logging_start(LOG_FORMAT_TEXT, "");
	for (int i = 0; i < 2; i++)
		check(!pthread_create(&threads[i], NULL, flood, names[i]), "thread");
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	log_warn("another kind");
	logging_stop();
	take(pipe_fd[0]);
	for (const char *s = text; *s; s++)
		lines += *s == '\n';
	has("web breaks, 49\n");
	has("db breaks, 49\n");
	is_without("breaks, 50\n");
	has("450 more like: web breaks, 499\n");
	has("another kind\n");
	check(lines == 2 * LOGGING_BURST + 3, "%d lines", lines);
}

/* Both ways: each event is explained, and nothing else is. */
static void catalog(const char *path)
{
	char line[256], id[64];
	int nr = 0;
	FILE *f = fopen(path, "r");

	check(f, "%s", path);
	while (fgets(line, sizeof(line), f)) {
		bool known = false;

		if (sscanf(line, "-- %63s", id) != 1)
			continue;
		nr++;
		for (int e = LOG_NO_EVENT + 1; e < LOG_NR_EVENTS; e++)
			known |= !strcmp(logging_message_id((enum log_event)e), id);
		check(known && strlen(id) == 32, "%s is no event", id);
	}
	fclose(f);
	check(nr == LOG_NR_EVENTS - 1, "%d of %d events explained", nr, LOG_NR_EVENTS - 1);
	for (int a = LOG_NO_EVENT + 1; a < LOG_NR_EVENTS; a++)
		for (int b = a + 1; b < LOG_NR_EVENTS; b++)
			check(strcmp(logging_message_id((enum log_event)a),
				     logging_message_id((enum log_event)b)) &&
				      strcmp(logging_event_name((enum log_event)a),
					     logging_event_name((enum log_event)b)),
			      "two events are the same");
}

static void listen_as_journal(void)
{
	struct sockaddr_un un = {.sun_family = AF_UNIX, .sun_path = "journal.sock"};

	unlink("journal.sock");
	if (journal_fd)
		close(journal_fd);
	journal_fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	check(!bind(journal_fd, (struct sockaddr *)&un, sizeof(un)), "bind");
}

int main(int argc, char **argv)
{
	char dir[] = "logging.XXXXXX";

	check(argc == 2, "logging CATALOG");
	catalog(argv[1]);
	check(mkdtemp(dir) && !chdir(dir), "mkdtemp");
	real_stderr = dup(STDERR_FILENO);
	check(!pipe2(pipe_fd, O_CLOEXEC | O_NONBLOCK), "pipe");
	dup2(pipe_fd[1], STDERR_FILENO);
	unsetenv("JOURNAL_STREAM");
	listen_as_journal();
	journal();
	listen_as_journal();
	automatic();
	fields();
	floods();
	dup2(real_stderr, STDERR_FILENO);
	unlink("journal.sock");
	check(!chdir("..") && !rmdir(dir), "rmdir");
	printf("%d events; journal, logfmt, JSON and text; floods are counted\n",
	       LOG_NR_EVENTS - 1);
	return 0;
}
