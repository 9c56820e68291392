/* SPDX-License-Identifier: MIT */
/*
 * digest: SHA-256 of all guest memory while everything stands still, left in the
 * snapshot as "note.ram-sha256"; `snapctl verify --digest` computes the same from the
 * store alone.  Agent's thread, within the save callback.
 *
 * Defined in snapd/upkeep/verify.h: for each page in ascending home GFN, the GFN as 8 bytes
 * little-endian, then the page.  A page's home GFN is where the guest first saw it, so
 * holes, ids, sizes and moves do not change it: low block, areas at their home, DIMM,
 * SMRAM.
 * Where other memory takes an area's place, the old memory is first given up with
 * SNAPD_SLOT_GONE: its home GFNs are free, and become those of the new memory.
 */
#include <endian.h>
#include <errno.h>
#include <openssl/evp.h>

#include "vmm/machine.h"

/* No other address space sees it: the first GFN beyond the addresses (agent/backing.c). */
#define SMRAM_HOME_GFN (1ull << 40)

static bool digest_pages(EVP_MD_CTX *ctx, uint64_t gfn, const void *hva, size_t len_bytes,
			 size_t page_size)
{
	const char *page = hva;

	for (; len_bytes; len_bytes -= page_size, page += page_size, gfn++) {
		uint64_t le = htole64(gfn);

		if (!EVP_DigestUpdate(ctx, &le, sizeof(le)) ||
		    !EVP_DigestUpdate(ctx, page, page_size))
			return false;
	}
	return true;
}

static bool digest_ram(struct machine *m, EVP_MD_CTX *ctx)
{
	const size_t page = m->page_size;
	uint32_t i;

	if (!digest_pages(ctx, 0, m->low.hva, m->low.len_bytes, page))
		return false;
	for (i = 0; i < m->nr_areas; i++) {
		struct area *a = &m->areas[i];

		if (!digest_pages(ctx, a->gpa / page, (char *)a->backing->hva + a->backing_offset,
				  a->nr_pages * GUEST_PAGE, page))
			return false;
	}
	if (m->dimm.fd >= 0 &&
	    !digest_pages(ctx, m->params.dimm_gpa / page, m->dimm.hva, m->dimm.len_bytes, page))
		return false;
	return m->smram.fd < 0 ||
	       digest_pages(ctx, SMRAM_HOME_GFN, m->smram.hva, m->smram.len_bytes, page);
}

int digest_save(struct machine *m, struct snapd_state_writer *w)
{
	EVP_MD_CTX *ctx = EVP_MD_CTX_new();
	unsigned char md[32];
	unsigned int len = 0;
	bool ok = ctx && EVP_DigestInit_ex(ctx, EVP_sha256(), NULL) && digest_ram(m, ctx) &&
		  EVP_DigestFinal_ex(ctx, md, &len) && len == sizeof(md);

	EVP_MD_CTX_free(ctx);
	return ok ? snapd_state_put(w, "note.ram-sha256", 0, 1, md, sizeof(md)) : -EIO;
}
