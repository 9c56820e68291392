/* SPDX-License-Identifier: MIT */
/*
 * verb_top: live figures on a terminal.  One thread.
 *
 * The screen is the alternate one, without cursor, echo and line mode; whatever ends snapctl gives
 * it back: 'q', a signal (the handlers only use what is async-signal-safe), Ctrl-Z and fg.  Where
 * there is no terminal, one frame is printed; on one that cannot move its cursor (TERM=dumb) frames
 * follow one another.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "tools/out.h"
#include "tools/snapctl.h"
#include "tools/top_sample.h"
#include "tools/top_view.h"

#define ENTER	     "\033[?1049h\033[?25l"
#define LEAVE	     "\033[?25h\033[?1049l"
#define DELAY_MIN_MS 100
#define DELAY_MAX_MS 3600000
#define ROWS_DEFAULT 24
#define COLS_DEFAULT 80

static struct {
	struct termios before;
	volatile sig_atomic_t entered, resized;
} screen;

struct top {
	const struct args *a;
	struct top_view view;
	struct top_sample now;
	char trouble[256]; /* why there is no newer sample; "" none */
	int delay_ms;
	bool held, quit;
};

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

/* ---- the terminal ---- */

static void give_back(void)
{
	if (!screen.entered)
		return;
	screen.entered = 0;
	(void)!write(STDOUT_FILENO, LEAVE, sizeof(LEAVE) - 1);
	tcsetattr(STDIN_FILENO, TCSANOW, &screen.before);
}

static void take_over(void)
{
	struct termios raw = screen.before;

	raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
	raw.c_cc[VMIN] = 0;
	raw.c_cc[VTIME] = 0;
	tcsetattr(STDIN_FILENO, TCSANOW, &raw);
	(void)!write(STDOUT_FILENO, ENTER, sizeof(ENTER) - 1);
	screen.entered = 1;
}

/* Ctrl-C is how one leaves; the others end snapctl as they would without us. */
static void on_end(int sig)
{
	give_back();
	if (sig == SIGINT)
		_exit(EXIT_DONE);
	signal(sig, SIG_DFL);
	raise(sig);
}

static void on_stop(int sig)
{
	int saved = errno;

	give_back();
	raise(SIGSTOP);
	/* fg */
	take_over();
	screen.resized = 1;
	errno = saved;
}

static void on_resize(int sig)
{
	screen.resized = 1;
}

static void set_signals(void)
{
	static const struct {
		int sig;
		void (*fn)(int sig);
	} all[] = {{SIGINT, on_end},  {SIGTERM, on_end},  {SIGHUP, on_end},
		   {SIGQUIT, on_end}, {SIGABRT, on_end},  {SIGSEGV, on_end},
		   {SIGPIPE, on_end}, {SIGTSTP, on_stop}, {SIGWINCH, on_resize}};

	for (size_t i = 0; i < ARRAY_SIZE(all); i++) {
		struct sigaction sa = {.sa_handler = all[i].fn};

		/* One at a time: none may run between give_back() and take_over(). */
		sigfillset(&sa.sa_mask);
		sigaction(all[i].sig, &sa, NULL);
	}
}

static int from_env(const char *name, int otherwise)
{
	const char *text = getenv(name);
	int n = text ? atoi(text) : 0;

	return n > 0 && n < 10000 ? n : otherwise;
}

static void measure(struct top_view *v)
{
	struct winsize ws = {0};

	if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &ws))
		ws = (struct winsize){0};
	v->cols = ws.ws_col ? ws.ws_col : from_env("COLUMNS", COLS_DEFAULT);
	v->rows = ws.ws_row ? ws.ws_row : from_env("LINES", ROWS_DEFAULT);
}

/* In one write, so that nothing flickers. */
static void draw(struct top *t)
{
	struct top_lines lines;
	char *text = NULL;
	size_t len;
	FILE *f = open_memstream(&text, &len);

	if (!f)
		abort();
	top_view_lines(&t->view, &t->now, &lines);
	fputs("\033[H", f);
	for (int i = 0; i < lines.nr; i++)
		fprintf(f, "%s%s%s\033[K%s", i == lines.head ? "\033[7m" : "", lines.text[i],
			i == lines.head ? "\033[0m" : "", i + 1 < lines.nr ? "\r\n" : "");
	fputs("\033[J", f);
	fclose(f);
	for (size_t at = 0; at < len;) {
		ssize_t n = write(STDOUT_FILENO, text + at, len - at);

		if (n < 0 && errno != EINTR)
			break;
		at += (size_t)MAX(n, (ssize_t)0);
	}
	free(text);
	top_lines_deinit(&lines);
}

/* ---- samples ---- */

/* The newest, against the one before; what was there stays when nobody answers. */
static int take(struct top *t)
{
	struct top_sample s;
	int rc = top_sample_take(t->a, &s);

	if (rc) {
		top_sample_deinit(&s);
		return rc;
	}
	top_sample_compare(&s, &t->now);
	top_sample_deinit(&t->now);
	t->now = s;
	top_sample_sort(&t->now, t->view.key, t->view.reverse);
	return 0;
}

static void take_or_tell(struct top *t)
{
	char why[sizeof(t->trouble)] = "";

	fail_into(why, sizeof(why));
	take(t);
	fail_into(NULL, 0);
	memcpy(t->trouble, why, sizeof(why));
	t->view.trouble = *t->trouble ? t->trouble : NULL;
}

static void sleep_ms(int ms)
{
	struct timespec ts = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};

	while (nanosleep(&ts, &ts) && errno == EINTR)
		;
}

/* ---- keys ---- */

static void sort_by(struct top *t, char letter)
{
	for (int i = 0; top_keys[i].name; i++)
		if (top_keys[i].letter == letter)
			t->view.key = i;
	top_sample_sort(&t->now, t->view.key, t->view.reverse);
}

static void on_key(struct top *t, char key)
{
	switch (key) {
	case 'q':
		t->quit = true;
		break;
	case 'r':
		t->view.reverse = !t->view.reverse;
		sort_by(t, top_keys[t->view.key].letter);
		break;
	case ' ':
		t->held = !t->held;
		break;
	case 'j':
		t->view.first++;
		break;
	case 'k':
		t->view.first -= t->view.first > 0;
		break;
	default:
		sort_by(t, key);
	}
}

/* Until the next sample is due or a key was pressed. */
static void wait_for_keys(struct top *t, uint64_t until_ms)
{
	struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};
	uint64_t now = now_ms();
	char keys[64];
	ssize_t n;

	if (poll(&p, 1, now < until_ms ? (int)(until_ms - now) : 0) <= 0)
		return;
	n = read(STDIN_FILENO, keys, sizeof(keys));
	if (n <= 0)
		t->quit = n == 0 || errno != EINTR;
	for (ssize_t i = 0; i < n && keys[i] != '\033'; i++)
		on_key(t, keys[i]);
}

static int live(struct top *t)
{
	uint64_t next_ms = now_ms();

	if (tcgetattr(STDIN_FILENO, &screen.before))
		return fail(EXIT_FAILED, "the terminal: %s", strerror(errno));
	t->view.keys = true;
	measure(&t->view);
	take_over();
	set_signals();
	while (!t->quit) {
		if (now_ms() >= next_ms) {
			if (!t->held)
				take_or_tell(t);
			next_ms = now_ms() + (uint64_t)t->delay_ms;
		}
		if (screen.resized) {
			screen.resized = 0;
			measure(&t->view);
		}
		draw(t);
		wait_for_keys(t, next_ms);
	}
	give_back();
	return EXIT_DONE;
}

/* ---- frames without a screen ---- */

static void print_frame(struct top *t)
{
	struct top_lines lines;

	top_view_lines(&t->view, &t->now, &lines);
	for (int i = 0; i < lines.nr; i++)
		puts(lines.text[i]);
	fflush(stdout);
	top_lines_deinit(&lines);
}

/* Rates need two samples. */
static int two_samples(struct top *t)
{
	int rc = take(t);

	if (rc)
		return rc;
	sleep_ms(t->delay_ms);
	return take(t);
}

static int frames(struct top *t, bool once)
{
	int rc = two_samples(t);

	while (!rc) {
		print_frame(t);
		if (once)
			break;
		sleep_ms(t->delay_ms);
		putchar('\n');
		rc = take(t);
	}
	return rc;
}

static int as_json(struct top *t)
{
	json_t *o;
	int rc = two_samples(t);

	if (rc)
		return rc;
	o = top_sample_json(&t->now);
	rc = print_json(o);
	json_decref(o);
	return rc;
}

static int parse_options(struct top *t)
{
	const char *delay = opt(t->a, "delay"), *sort = opt(t->a, "sort");
	char *end;
	double s = delay ? strtod(delay, &end) : 1;

	if (delay &&
	    (end == delay || *end || !(s * 1000 >= DELAY_MIN_MS && s * 1000 <= DELAY_MAX_MS)))
		return fail(EXIT_USAGE, "--delay %s: seconds, 0.1 to 3600", delay);
	t->delay_ms = (int)(s * 1000);
	t->view.key = top_key_find(sort ? sort : "dirty");
	if (t->view.key < 0)
		return fail(EXIT_USAGE,
			    "--sort %s: want name, state, dirty, behind, age, pause, "
			    "still, epochs or full",
			    sort);
	return 0;
}

int verb_top(const struct args *a)
{
	const char *term = getenv("TERM");
	bool terminal = isatty(STDOUT_FILENO) && isatty(STDIN_FILENO);
	struct top t = {.a = a, .view = {.cols = 1000}};
	int rc = parse_options(&t);

	if (rc)
		return rc;
	if (a->json)
		rc = as_json(&t);
	else if (opt(a, "once") || !terminal)
		rc = frames(&t, true);
	else if (!term || !strcmp(term, "dumb"))
		rc = frames(&t, false);
	else
		rc = live(&t);
	top_sample_deinit(&t.now);
	return rc;
}
