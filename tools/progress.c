/* SPDX-License-Identifier: MIT */
/* One line of progress; see progress.h. */
#include "tools/progress.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "tools/human.h"
#include "tools/snapctl.h"

#define BAR_MAX	 30
#define EVERY_MS 100

static struct {
	char what[40];
	uint64_t start_ms, start_done, last_ms;
	bool drawn;
} line;

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

static int columns(void)
{
	struct winsize ws;

	return !ioctl(STDERR_FILENO, TIOCGWINSZ, &ws) && ws.ws_col ? ws.ws_col : 80;
}

static void bar(char *out, int width, uint64_t done, uint64_t total)
{
	int full = total ? (int)((double)done / (double)total * width) : 0;

	*out++ = '[';
	for (int i = 0; i < width; i++)
		*out++ = i < full ? '#' : '.';
	*out++ = ']';
	*out = '\0';
}

static void draw(uint64_t now, uint64_t done, uint64_t total, bool bytes)
{
	double seconds = (double)(now - line.start_ms) / 1000;
	double rate = seconds > 0.2 ? (double)(done - line.start_done) / seconds : 0;
	char text[256], gauge[BAR_MAX + 3] = "", a[24], b[24], r[24], eta[24] = "";
	int cols = columns();

	if (total && cols >= 60)
		bar(gauge, MIN(BAR_MAX, cols - 55), MIN(done, total), total);
	if (total && rate > 0 && done < total)
		human_seconds(eta, sizeof(eta), (double)(total - done) / rate);
	snprintf(text, sizeof(text), "%s %s %s%s%s%s  %s/s%s%s", line.what, gauge,
		 human_amount(a, sizeof(a), done, bytes), total ? " of " : "",
		 total ? human_amount(b, sizeof(b), total, bytes) : "", bytes ? "" : " pages",
		 human_amount(r, sizeof(r), (uint64_t)rate, bytes), *eta ? "  left " : "", eta);
	fprintf(stderr, "\r\033[K%.*s", cols - 1, text);
	fflush(stderr);
	line.drawn = true;
}

void progress_show(const struct args *a, const char *what, uint64_t done, uint64_t total,
		   bool bytes)
{
	uint64_t now;

	if (a->no_progress || !isatty(STDERR_FILENO))
		return;
	now = now_ms();
	if (strcmp(what, line.what) != 0 || done < line.start_done) {
		snprintf(line.what, sizeof(line.what), "%s", what);
		line.start_ms = now;
		line.start_done = done;
	} else if (now - line.last_ms < EVERY_MS) {
		return;
	}
	line.last_ms = now;
	draw(now, done, total, bytes);
}

void progress_clear(void)
{
	if (line.drawn)
		fputs("\r\033[K", stderr);
	line.drawn = false;
}
