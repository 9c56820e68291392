/* SPDX-License-Identifier: MIT */
/* shell: a command as a line that a shell takes. */
#pragma once

#include <stddef.h>
#include <stdio.h>

/* Those variables of the environment that are set and not empty, then argv (NULL
 * terminated), quoted where need be; ends with a newline. */
void shell_print_command(FILE *to, const char *const *env, size_t nr_env, char *const *argv);
