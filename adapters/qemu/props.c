/* SPDX-License-Identifier: MIT */
/* props: see props.h.  QEMU's grammar: util/keyval.c, util/qemu-option.c; ",," is a comma. */
#include "adapters/qemu/props.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

static void *must(void *p)
{
	if (!p)
		abort();
	return p;
}

/* Length of the piece at `text`, up to a single comma or the end. */
static size_t piece_length(const char *text)
{
	size_t n = 0;

	while (text[n] && (text[n] != ',' || text[n + 1] == ','))
		n += text[n] == ',' ? 2 : 1;
	return n;
}

static char *unescape(const char *text, size_t len)
{
	char *out = must(malloc(len + 1)), *to = out;

	for (size_t i = 0; i < len; i++) {
		*to++ = text[i];
		i += text[i] == ',';
	}
	*to = '\0';
	return out;
}

static void set_piece(json_t *o, const char *piece, const char *implied)
{
	const char *eq = strchr(piece, '=');
	_cleanup_free_ char *key = NULL;

	if (!eq) {
		json_object_set_new(o, implied ? implied : piece,
				    json_string(implied ? piece : "on"));
		return;
	}
	key = must(strndup(piece, (size_t)(eq - piece)));
	json_object_set_new(o, key, json_string(eq + 1));
}

static json_t *parse_keyval(const char *text, const char *implied)
{
	json_t *o = must(json_object());

	for (size_t n; *text; text += n + (text[n] == ',')) {
		_cleanup_free_ char *piece = NULL;

		n = piece_length(text);
		piece = unescape(text, n);
		set_piece(o, piece, implied);
		implied = NULL;
	}
	return o;
}

/* Numbers and booleans as the texts that they would be in the other notation. */
static void texts(json_t *o)
{
	const char *key;
	char number[32];
	json_t *v;
	void *tmp;

	json_object_foreach_safe(o, tmp, key, v)
	{
		if (json_is_boolean(v)) {
			json_object_set_new(o, key, json_string(json_is_true(v) ? "on" : "off"));
		} else if (json_is_integer(v)) {
			snprintf(number, sizeof(number), "%lld", (long long)json_integer_value(v));
			json_object_set_new(o, key, json_string(number));
		}
	}
}

json_t *props_parse(const char *text, const char *implied)
{
	json_t *o = *text == '{' ? json_loads(text, 0, NULL) : NULL;

	if (!o)
		return parse_keyval(text, implied);
	texts(o);
	return o;
}

const char *props_get(const json_t *props, const char *key)
{
	const char *v = json_string_value(json_object_get(props, key));

	return v ? v : "";
}

bool props_on(const json_t *props, const char *key)
{
	const char *v = props_get(props, key);

	return !strcmp(v, "on") || !strcmp(v, "yes") || !strcmp(v, "true") || !strcmp(v, "y");
}

/* ---- replacing ---- */

static bool is_one_of(const char *key, size_t len, const char *const *keys)
{
	for (; *keys; keys++)
		if (strlen(*keys) == len && !memcmp(*keys, key, len))
			return true;
	return false;
}

static size_t replace_json(json_t *o, const char *const *keys, const char *from, const char *to)
{
	const char *key;
	size_t nr = 0, i;
	json_t *v;
	void *tmp;

	json_array_foreach(o, i, v) nr += replace_json(v, keys, from, to);
	json_object_foreach_safe(o, tmp, key, v)
	{
		const char *text = json_string_value(v);

		if (text && is_one_of(key, strlen(key), keys) && !strcmp(text, from)) {
			json_object_set_new(o, key, json_string(to));
			nr++;
		}
		nr += replace_json(v, keys, from, to);
	}
	return nr;
}

static void put_escaped(FILE *f, const char *s)
{
	for (; *s; s++) {
		fputc(*s, f);
		if (*s == ',')
			fputc(',', f);
	}
}

static size_t replace_piece(FILE *f, const char *piece, size_t len, const char *const *keys,
			    const char *from, const char *to)
{
	const char *eq = memchr(piece, '=', len);
	_cleanup_free_ char *value = NULL;

	if (eq)
		value = unescape(eq + 1, len - (size_t)(eq + 1 - piece));
	if (!eq || !is_one_of(piece, (size_t)(eq - piece), keys) || strcmp(value, from) != 0) {
		fwrite(piece, 1, len, f);
		return 0;
	}
	fwrite(piece, 1, (size_t)(eq + 1 - piece), f);
	put_escaped(f, to);
	return 1;
}

char *props_replace(const char *text, const char *const *keys, const char *from, const char *to,
		    size_t *nr)
{
	json_t *o = *text == '{' ? json_loads(text, 0, NULL) : NULL;
	char *out = NULL;
	size_t len;
	FILE *f;

	if (o) {
		size_t n = replace_json(o, keys, from, to);

		*nr += n;
		out = n ? json_dumps(o, JSON_COMPACT) : strdup(text);
		json_decref(o);
		return must(out);
	}
	f = must(open_memstream(&out, &len));
	for (size_t n; *text; text += n) {
		n = piece_length(text);
		*nr += replace_piece(f, text, n, keys, from, to);
		if (text[n] == ',')
			fputc(text[n++], f);
	}
	fclose(f);
	return must(out);
}

unsigned long long props_size(const char *text, unsigned long long unit)
{
	static const char suffixes[] = "bkmgtpe";
	long double n;
	const char *s;
	char *end;

	if (!isdigit((unsigned char)*text))
		return 0;
	n = strtold(text, &end);
	if (*end) {
		s = strchr(suffixes, tolower((unsigned char)*end));
		if (!s || end[1])
			return 0;
		unit = 1ull << (10 * (s - suffixes));
	}
	n *= unit;
	return n >= 1 && n < 0x1p63L ? (unsigned long long)n : 0;
}
