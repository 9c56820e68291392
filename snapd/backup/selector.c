/* SPDX-License-Identifier: MIT */
/* Which snapshot of a repository a text names; see backup.h. */
#include "snapd/backup/jobs.h"

#include <errno.h>
#include <string.h>

#define PREFIX_MIN 4

static bool is_prefix(const struct manifest *m, const char *text)
{
	char hex[BK_HEX_BYTES];
	size_t len = strlen(text);

	return len >= PREFIX_MIN && len < BK_HEX_BYTES &&
	       !memcmp(name_hex(&m->name, hex), text, len);
}

static bool selects(const struct manifest *m, const char *selector)
{
	const char *at = strchr(selector, '@');
	size_t len = at ? (size_t)(at - selector) : 0;

	if (!at)
		return is_prefix(m, selector);
	return strlen(m->m.vm) == len && !memcmp(m->m.vm, selector, len) &&
	       (!strcmp(m->m.name, at + 1) || is_prefix(m, at + 1));
}

int backup_select(const struct repo_list *l, const char *selector, const struct manifest **ret,
		  struct err *e)
{
	const struct manifest *newest = NULL;

	*ret = NULL;
	for (size_t i = 0; i < l->nr; i++) {
		const struct manifest *m = &l->all[i];

		if (!strcmp(m->m.vm, selector))
			newest = m; /* by time */
		if (!selects(m, selector))
			continue;
		if (*ret)
			return err_set(e, EINVAL,
				       "%.80s is more than one snapshot: name its digits",
				       selector);
		*ret = m;
	}
	if (newest)
		*ret = newest;
	return *ret ? 0 : err_set(e, ENOENT, "the repository has no snapshot %.80s", selector);
}
