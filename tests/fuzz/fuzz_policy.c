/* SPDX-License-Identifier: MIT */
/*
 * Any text as a policy, "key = value" a line, as a file has it and as the API gets it; the
 * first line is a calendar event besides.  What is refused has a reason; what is accepted is
 * due at some time after now, and reads back as it was written.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "snapd/policy/policy.h"
#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"

#define TEXT_MAX 4096u
#define NOW	 1700000000

static char dir[] = "/tmp/fuzz-policy-XXXXXX";

static void clean_up(void)
{
	char path[64];

	snprintf(path, sizeof(path), "%s/p.conf", dir);
	unlink(path);
	rmdir(dir);
}

static void check_calendar(const char *text)
{
	struct calendar c, same;
	struct zone *utc = NULL;
	struct err e = {0};
	int64_t next;
	int r = calendar_parse(text, &c, &e);

	PROMISE(r == 0 || r == -EINVAL);
	PROMISE((r == 0) == !e.text[0]);
	if (r)
		return;
	PROMISE(!calendar_parse(text, &same, NULL) && !memcmp(&c, &same, sizeof(c)));
	PROMISE(!zone_open("UTC", &utc, NULL));
	next = calendar_next(&c, utc, NOW);
	PROMISE(next > NOW);
	if (next != INT64_MAX)
		PROMISE(calendar_next(&c, utc, next) > next &&
			calendar_next(&c, utc, next - 1) == next);
	zone_close(utc);
}

/* Each line as a setting; false: one was refused. */
static bool set_all(struct policy *p, char *text)
{
	char *rest = text, *line;

	while ((line = strsep(&rest, "\n"))) {
		char *value = strchr(line, '=');
		struct err e = {0};
		int r;

		if (!value)
			continue;
		*value++ = '\0';
		r = policy_set(p, line, value, &e);
		PROMISE((r == 0) == !e.text[0]);
		if (r)
			return false;
		PROMISE(policy_text(p, line));
	}
	return true;
}

static void check_written(const struct policy *p)
{
	struct policy *again = NULL;
	struct err e = {0};

	PROMISE(!policy_write(dir, p, &e) && !policy_read(dir, p->name, &again, &e));
	for (size_t i = 0; policy_setting(i); i++)
		PROMISE(!strcmp(policy_text(p, policy_setting(i)),
				policy_text(again, policy_setting(i))));
	policy_free(again);
}

static void check_policy(char *text)
{
	int64_t last = NOW;
	struct policy *p;
	struct err e = {0};
	int r;

	PROMISE(!policy_new("p", &p, &e));
	if (set_all(p, text)) {
		r = policy_finish(p, &e);
		PROMISE((r == 0) == !e.text[0]);
		if (!r) {
			policy_covers(p, "guest", 1000, "a,b");
			PROMISE(policy_due(p, "guest", &last, NOW) >= NOW);
			check_written(p);
		}
	}
	policy_free(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	_cleanup_free_ char *text = strndup((const char *)data, MIN(len, (size_t)TEXT_MAX));
	static bool made;

	if (!made) {
		PROMISE(mkdtemp(dir) && !atexit(clean_up));
		made = true;
	}
	PROMISE(text);
	check_policy(text);
	check_calendar(text); /* strsep() left its first line, or the part before "=" */
	return 0;
}
