/* SPDX-License-Identifier: MIT */
/*
 * Goal: docs/openapi.yaml describes what the daemon answers, no more and no less.
 * Method: paths stand at two blanks in the file, methods at four; compare with the
 * daemon's table, both ways.  Usage: api_routes OPENAPI.YAML
 */
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "snapd/api/api.h"

#define ROUTES_MAX 64

static struct {
	char path[80], method[80];
	int seen;
} documented[ROUTES_MAX];
static int nr;

static int is_method(const char *word)
{
	static const char *const methods[] = {"get", "post", "put", "delete", "patch", "head"};

	for (size_t i = 0; i < sizeof(methods) / sizeof(*methods); i++)
		if (!strcmp(methods[i], word))
			return 1;
	return 0;
}

static void read_file(FILE *f)
{
	char line[512], path[80] = "", word[80];

	while (fgets(line, sizeof(line), f) && strncmp(line, "components:", 11)) {
		if (sscanf(line, "  /%78[^:]:", word) == 1 && !strncmp(line, "  /", 3))
			snprintf(path, sizeof(path), "/%.78s", word);
		else if (!strncmp(line, "    ", 4) && line[4] != ' ' &&
			 sscanf(line, " %79[a-z]:", word) == 1 && is_method(word) &&
			 nr < ROUTES_MAX) {
			strcpy(documented[nr].path, path);
			strcpy(documented[nr++].method, word);
		}
	}
}

static int find(const struct api_route *r)
{
	for (int i = 0; i < nr; i++)
		if (!strcmp(documented[i].path, r->path) &&
		    !strcasecmp(documented[i].method, r->method))
			return i;
	return -1;
}

int main(int argc, char **argv)
{
	FILE *f = argc == 2 ? fopen(argv[1], "r") : NULL;
	int bad = 0;

	if (!f) {
		fprintf(stderr, "usage: api_routes OPENAPI.YAML\n");
		return 1;
	}
	read_file(f);
	fclose(f);
	for (size_t i = 0; i < api_nr_routes; i++) {
		int at = find(&api_routes[i]);

		if (at >= 0) {
			documented[at].seen++;
			continue;
		}
		printf("not documented: %s %s\n", api_routes[i].method, api_routes[i].path);
		bad = 1;
	}
	for (int i = 0; i < nr; i++)
		if (documented[i].seen != 1) {
			printf("documented, but not there: %s %s\n", documented[i].method,
			       documented[i].path);
			bad = 1;
		}
	printf("%d routes\n", nr);
	return bad || nr < 10;
}
