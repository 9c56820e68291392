/* SPDX-License-Identifier: MIT */
/*
 * Any text as FILE.json of an exported snapshot, which snapctl reads to import it; first byte
 * 1: as the service's description of a snapshot, too, from which the file is laid out.  What
 * is accepted is a map whose runs ascend, and records within the text.
 */
#include <stdarg.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"
#include "tools/image.h"
#include "tools/out.h"
#include "tools/snapctl.h"

/* snapctl's own would write to stderr. */
int fail(int code, const char *fmt, ...)
{
	char line[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	PROMISE(code && line[0]);
	return code;
}

static void check_map(const struct image_map *m)
{
	for (size_t i = 0; i < m->nr; i++) {
		const struct image_run *r = &m->runs[i];
		uint64_t len;

		PROMISE(!i || r->gpa >= m->runs[i - 1].gpa + m->runs[i - 1].len);
		if (!r->len)
			continue;
		PROMISE(image_offset(m, r->gpa, &len) == (int64_t)r->offset && len == r->len);
		PROMISE(image_offset(m, r->gpa + r->len - 1, &len) >= 0 && len == 1);
	}
}

static void check_description(json_t *state)
{
	struct snapd_state_writer w;
	struct image_map m = {0};
	const void *blob;
	char *header = NULL;
	size_t len;

	if (!image_map_read(state, "FILE.json", &m))
		check_map(&m);
	image_map_deinit(&m);
	PROMISE(!state_writer_init(&w));
	if (!image_blob(state, "FILE.json", &w, &blob, &len))
		PROMISE(blob && len);
	state_writer_deinit(&w);
	if (!image_header(state, "FILE.json", "vm", "name", "note", "tags", 1, &header))
		PROMISE(header && strchr(header, '\n') == header + strlen(header) - 1);
	free(header);
}

static void check_service(json_t *state)
{
	struct image_map m = {0}, again = {0};

	if (!image_map_make(state, "dir/FILE", &m) && !image_map_read(state, "FILE.json", &again))
		check_map(&again);
	image_map_deinit(&m);
	image_map_deinit(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	json_error_t je;
	json_t *state;

	if (!len)
		return 0;
	state = json_loadb((const char *)data + 1, len - 1, 0, &je);
	if (!state)
		return 0;
	check_description(state);
	if (data[0] & 1)
		check_service(state);
	json_decref(state);
	return 0;
}
