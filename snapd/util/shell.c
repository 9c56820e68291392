/* SPDX-License-Identifier: MIT */
/* shell: see shell.h.  In: words.  Out: one line of sh(1).  Any thread. */
#include "snapd/util/shell.h"

#include <stdlib.h>
#include <string.h>

static void print_word(FILE *to, const char *s)
{
	static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
				    "_-./:=,+@%";

	if (*s && strspn(s, plain) == strlen(s)) {
		fputs(s, to);
		return;
	}
	fputc('\'', to);
	for (; *s; s++)
		if (*s == '\'')
			fputs("'\\''", to);
		else
			fputc(*s, to);
	fputc('\'', to);
}

void shell_print_command(FILE *to, const char *const *env, size_t nr_env, char *const *argv)
{
	for (size_t i = 0; i < nr_env; i++) {
		const char *value = getenv(env[i]);

		if (!value || !*value)
			continue;
		fprintf(to, "%s=", env[i]);
		print_word(to, value);
		fputc(' ', to);
	}
	for (size_t i = 0; argv[i]; i++) {
		if (i)
			fputc(' ', to);
		print_word(to, argv[i]);
	}
	fputc('\n', to);
}
