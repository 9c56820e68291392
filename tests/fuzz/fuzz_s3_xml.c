/* SPDX-License-Identifier: MIT */
/* Any answer of an S3 server: a page of a list keeps what s3_xml.h says; what an error says
 * is printable and ends. */
#include <string.h>

#include "snapd/backup/s3_xml.h"
#include "tests/fuzz/fuzz.h"

static void printable(const char *text, size_t size)
{
	size_t len = strnlen(text, size);

	PROMISE(len < size);
	for (size_t i = 0; i < len; i++)
		PROMISE(text[i] >= ' ' && text[i] <= '~');
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct s3_error error;
	struct s3_page page;
	int r = s3_parse_page((const char *)data, len, &page);

	PROMISE(r == 0 || r == -EPROTO || r == -ENOMEM);
	if (!r) {
		PROMISE(page.nr <= S3_PAGE_OBJECTS);
		for (size_t i = 0; i < page.nr; i++)
			PROMISE(*page.objects[i].key && strlen(page.objects[i].key) <= S3_KEY_MAX &&
				page.objects[i].info.size <= INT64_MAX);
		s3_page_free(&page);
	} else {
		PROMISE(!page.nr && !page.objects);
	}
	s3_parse_error((const char *)data, len, &error);
	printable(error.code, sizeof(error.code));
	printable(error.message, sizeof(error.message));
	printable(error.region, sizeof(error.region));
	printable(error.endpoint, sizeof(error.endpoint));
	return 0;
}
