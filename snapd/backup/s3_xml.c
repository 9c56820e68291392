/* SPDX-License-Identifier: MIT */
/* Listings and errors of S3 servers, by expat; see s3_xml.h. */
#include "snapd/backup/s3_xml.h"

#include <expat.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/util/cleanup.h"

#define NAME_MAX_BYTES 40

struct parser {
	XML_Parser expat;
	void (*begin)(struct parser *p);				 /* an element */
	void (*end)(struct parser *p, const char *in, const char *name); /* of one in `in` */
	int depth;							 /* open elements */
	char name[S3_XML_DEPTH][NAME_MAX_BYTES + 1];
	char text[S3_KEY_MAX + 1]; /* of the innermost, if it has no element in it */
	size_t text_len;
	int r;
	/* for pages */
	struct s3_page *page;
	struct s3_object object;
	bool has_key, has_size, has_time, has_truncated;
	/* for errors */
	struct s3_error *error;
};

static void fail(struct parser *p, int r)
{
	p->r = p->r ?: r;
	XML_StopParser(p->expat, XML_FALSE);
}

static void on_doctype(void *arg, const XML_Char *name, const XML_Char *sysid,
		       const XML_Char *pubid, int internal)
{
	fail(arg, -EPROTO);
}

static void on_begin(void *arg, const XML_Char *name, const XML_Char **attributes)
{
	struct parser *p = arg;
	const char *colon = strrchr(name, ':');

	name = colon ? colon + 1 : name;
	if (p->depth == S3_XML_DEPTH) {
		fail(p, -EPROTO);
		return;
	}
	/* One whose name is longer is none that we know. */
	strncpy(p->name[p->depth], strlen(name) > NAME_MAX_BYTES ? "?" : name, NAME_MAX_BYTES);
	p->depth++;
	p->text_len = 0;
	if (p->begin)
		p->begin(p);
}

static void on_text(void *arg, const XML_Char *s, int len)
{
	struct parser *p = arg;
	size_t n = MIN((size_t)len, sizeof(p->text) - p->text_len);

	/* Of what does not fit, one byte too many is kept: its length tells. */
	memcpy(p->text + p->text_len, s, n);
	p->text_len += n;
}

static void on_end(void *arg, const XML_Char *name)
{
	struct parser *p = arg;

	if (p->r)
		return;
	p->depth--;
	if (p->text_len < sizeof(p->text))
		p->text[p->text_len] = '\0';
	p->end(p, p->depth ? p->name[p->depth - 1] : "", p->name[p->depth]);
	p->text_len = 0;
}

static int run(struct parser *p, const char *xml, size_t len)
{
	if (len > INT_MAX)
		return -EPROTO;
	p->expat = XML_ParserCreate("UTF-8");
	if (!p->expat)
		return -ENOMEM;
	XML_SetUserData(p->expat, p);
	XML_SetElementHandler(p->expat, on_begin, on_end);
	XML_SetCharacterDataHandler(p->expat, on_text);
	XML_SetStartDoctypeDeclHandler(p->expat, on_doctype);
	if (XML_Parse(p->expat, xml, (int)len, 1) != XML_STATUS_OK && !p->r)
		p->r = XML_GetErrorCode(p->expat) == XML_ERROR_NO_MEMORY ? -ENOMEM : -EPROTO;
	XML_ParserFree(p->expat);
	return p->r;
}

/* ---- pages ---- */

/* 0 to INT64_MAX, digits only. */
static bool parse_size(const char *s, uint64_t *ret)
{
	*ret = 0;
	if (!*s || strlen(s) > 18)
		return false;
	for (; *s; s++) {
		if (*s < '0' || *s > '9')
			return false;
		*ret = *ret * 10 + (uint64_t)(*s - '0');
	}
	return true;
}

/* "2013-05-24T00:00:00.000Z"; less than a second does not matter. */
static bool parse_time(const char *s, int64_t *ret)
{
	struct tm tm = {0};
	const char *rest = strptime(s, "%Y-%m-%dT%H:%M:%S", &tm);

	if (!rest || !(*rest == '.' || *rest == 'Z'))
		return false;
	*ret = timegm(&tm);
	return true;
}

static void page_begin(struct parser *p)
{
	if (p->depth == 2 && !strcmp(p->name[1], "Contents"))
		p->has_key = p->has_size = p->has_time = false;
}

static void add_object(struct parser *p)
{
	struct s3_page *page = p->page;

	if (!p->has_key || !p->has_size || !p->has_time || page->nr == S3_PAGE_OBJECTS) {
		fail(p, -EPROTO);
		return;
	}
	page->objects[page->nr++] = p->object;
	p->object.key = NULL;
	p->has_key = false;
}

static void object_end(struct parser *p, const char *name)
{
	const char *text = p->text;
	bool ok = true;

	if (!strcmp(name, "Key")) {
		ok = !p->has_key && p->text_len && p->text_len <= S3_KEY_MAX &&
		     !memchr(text, '\0', p->text_len);
		if (ok) {
			free(p->object.key);
			p->object.key = strdup(text);
		}
		p->has_key = ok;
	} else if (!strcmp(name, "Size")) {
		ok = p->has_size = parse_size(text, &p->object.info.size);
	} else if (!strcmp(name, "LastModified")) {
		ok = p->has_time = parse_time(text, &p->object.info.mtime_s);
	}
	if (!ok)
		fail(p, -EPROTO);
	else if (p->has_key && !p->object.key)
		fail(p, -ENOMEM);
}

static void page_end(struct parser *p, const char *in, const char *name)
{
	if (p->text_len > S3_KEY_MAX)
		p->text[0] = '\0';
	if (p->depth == 2 && !strcmp(in, "Contents")) {
		object_end(p, name);
	} else if (p->depth == 1 && !strcmp(name, "Contents")) {
		add_object(p);
	} else if (p->depth == 1 && !strcmp(name, "IsTruncated")) {
		p->page->truncated = !strcmp(p->text, "true");
		p->has_truncated = p->page->truncated || !strcmp(p->text, "false");
	} else if (!p->depth && strcmp(name, "ListBucketResult") != 0) {
		fail(p, -EPROTO);
	}
}

int s3_parse_page(const char *xml, size_t len, struct s3_page *ret)
{
	struct parser p = {.begin = page_begin, .end = page_end, .page = ret};
	int r;

	*ret = (struct s3_page){.objects = calloc(S3_PAGE_OBJECTS, sizeof(*ret->objects))};
	r = ret->objects ? run(&p, xml, len) : -ENOMEM;
	free(p.object.key);
	if (!r && !p.has_truncated)
		r = -EPROTO;
	if (r)
		s3_page_free(ret);
	return r;
}

void s3_page_free(struct s3_page *page)
{
	for (size_t i = 0; i < page->nr; i++)
		free(page->objects[i].key);
	free(page->objects);
	*page = (struct s3_page){0};
}

/* ---- errors ---- */

/* What goes to a log: no control characters, no other alphabets. */
static void copy_printable(char *dst, size_t size, const char *src, size_t len)
{
	size_t n = MIN(len, size - 1);

	for (size_t i = 0; i < n; i++)
		dst[i] = src[i] >= ' ' && src[i] <= '~' ? src[i] : '?';
	dst[n] = '\0';
}

static void error_end(struct parser *p, const char *in, const char *name)
{
	struct s3_error *x = p->error;

	if (p->depth != 1 || strcmp(in, "Error") != 0)
		return;
	if (!strcmp(name, "Code"))
		copy_printable(x->code, sizeof(x->code), p->text, p->text_len);
	else if (!strcmp(name, "Message"))
		copy_printable(x->message, sizeof(x->message), p->text, p->text_len);
	else if (!strcmp(name, "Region"))
		copy_printable(x->region, sizeof(x->region), p->text, p->text_len);
	else if (!strcmp(name, "Endpoint"))
		copy_printable(x->endpoint, sizeof(x->endpoint), p->text, p->text_len);
}

void s3_parse_error(const char *xml, size_t len, struct s3_error *ret)
{
	struct parser p = {.end = error_end, .error = ret};

	*ret = (struct s3_error){0};
	run(&p, xml, len); /* what came before a mistake is as good as the rest */
}
