/* SPDX-License-Identifier: MIT */
/* Manifests of a backup; see manifest.h. */
#include "snapd/backup/manifest.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/core/name.h"
#include "snapd/state.h"
#include "snapd/util/cleanup.h"

#define CMDLINE_MAX (1u << 20)
#define MAPS_MAX    (1u << 20)

void manifest_deinit(struct manifest *m)
{
	free(m->maps);
	free(m->cmdline);
	m->maps = NULL;
	m->cmdline = NULL;
}

int manifest_encode(const struct manifest *m, uint8_t **ret, size_t *ret_len)
{
	size_t layers = m->m.nr_layers * sizeof(*m->layers);
	size_t maps = m->m.nr_maps * sizeof(*m->maps);
	uint8_t *p;

	*ret_len = sizeof(m->m) + layers + maps + m->m.cmdline_bytes;
	*ret = p = malloc(*ret_len);
	if (!p)
		return -ENOMEM;
	memcpy(p, &m->m, sizeof(m->m));
	memcpy(p + sizeof(m->m), m->layers, layers);
	if (maps)
		memcpy(p + sizeof(m->m) + layers, m->maps, maps);
	if (m->m.cmdline_bytes)
		memcpy(p + sizeof(m->m) + layers + maps, m->cmdline, m->m.cmdline_bytes);
	return 0;
}

/* NUL-terminated, zero-filled, without control characters. */
static bool is_text(const char *text, size_t size)
{
	size_t len = strnlen(text, size);

	if (len == size)
		return false;
	for (size_t i = 0; i < len; i++)
		if ((unsigned char)text[i] < ' ' || text[i] == 0x7f)
			return false;
	for (size_t i = len; i < size; i++)
		if (text[i])
			return false;
	return true;
}

static int check(const struct bk_manifest *m, size_t len, struct err *e)
{
	if (!is_text(m->vm, sizeof(m->vm)) || !is_text(m->arch, sizeof(m->arch)) ||
	    !is_text(m->host, sizeof(m->host)) || !is_text(m->name, sizeof(m->name)) ||
	    !is_text(m->note, sizeof(m->note)) || !is_text(m->tags, sizeof(m->tags)) ||
	    name_check("vm", m->vm, NULL) || (*m->name && name_check("name", m->name, NULL)))
		return err_set(e, E_CORRUPT, "the manifest's names make no sense");
	if ((m->page_size != 4096 && m->page_size != 16384 && m->page_size != 65536) ||
	    m->flags & ~(BK_SNAPSHOT_PINNED | BK_SNAPSHOT_POSTMORTEM) || !m->state_bytes ||
	    m->state_bytes > STATE_MAX_BYTES || !m->nr_layers || m->nr_layers > BK_LAYERS_MAX ||
	    m->nr_maps > MAPS_MAX || m->nr_maps < m->nr_layers || m->cmdline_bytes > CMDLINE_MAX ||
	    m->taken_ns > INT64_MAX || m->pushed_ns > INT64_MAX || m->snapshot > INT64_MAX ||
	    m->bytes_sent > INT64_MAX || m->pause_ns > INT64_MAX ||
	    m->nr_pages > INT64_MAX / 65536 ||
	    len != sizeof(*m) + m->nr_layers * sizeof(struct bk_layer) +
			    (size_t)m->nr_maps * sizeof(struct bk_name) + m->cmdline_bytes)
		return err_set(e, E_CORRUPT, "the manifest's numbers make no sense");
	return 0;
}

static int check_layers(const struct manifest *m, struct err *e)
{
	uint64_t nr = 0;

	for (uint32_t i = 0; i < m->m.nr_layers; i++) {
		if (!m->layers[i].nr_maps || m->layers[i].reserved)
			return err_set(e, E_CORRUPT, "layer %u of the manifest makes no sense", i);
		nr += m->layers[i].nr_maps;
	}
	if (nr != m->m.nr_maps ||
	    (m->m.cmdline_bytes && m->cmdline[m->m.cmdline_bytes - 1] != '\0'))
		return err_set(e, E_CORRUPT, "the manifest's parts do not add up");
	return 0;
}

int manifest_decode(const uint8_t *payload, size_t len, struct manifest *ret, struct err *e)
{
	size_t at = sizeof(ret->m);
	int rc;

	*ret = (struct manifest){0};
	if (len < sizeof(ret->m))
		return err_set(e, E_CORRUPT, "the manifest is cut off");
	memcpy(&ret->m, payload, sizeof(ret->m));
	rc = check(&ret->m, len, e);
	if (rc)
		return rc;
	memcpy(ret->layers, payload + at, ret->m.nr_layers * sizeof(*ret->layers));
	at += ret->m.nr_layers * sizeof(*ret->layers);
	ret->maps = malloc((size_t)ret->m.nr_maps * sizeof(*ret->maps));
	ret->cmdline = malloc(ret->m.cmdline_bytes + 1);
	if (!ret->maps || !ret->cmdline)
		rc = err_errno(e, ENOMEM, "manifest");
	if (!rc) {
		memcpy(ret->maps, payload + at, (size_t)ret->m.nr_maps * sizeof(*ret->maps));
		at += (size_t)ret->m.nr_maps * sizeof(*ret->maps);
		memcpy(ret->cmdline, payload + at, ret->m.cmdline_bytes);
		rc = check_layers(ret, e);
	}
	if (rc)
		manifest_deinit(ret);
	return rc;
}

int manifest_add_map(struct manifest *m, const struct bk_name *name)
{
	struct bk_name *maps = realloc(m->maps, (m->m.nr_maps + 1) * sizeof(*maps));

	if (!maps)
		return -ENOMEM;
	m->maps = maps;
	maps[m->m.nr_maps++] = *name;
	return 0;
}

uint64_t manifest_frames(const struct manifest *m, uint32_t first_layer)
{
	uint64_t nr = 0;

	for (uint32_t i = first_layer; i < m->m.nr_layers; i++)
		nr += m->layers[i].nr_frames;
	return nr;
}
