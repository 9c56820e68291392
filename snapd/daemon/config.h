/* SPDX-License-Identifier: MIT */
/* config: the command line and the configuration file → struct daemon_config. */
#pragma once

#include "snapd/core/daemon.h"

enum config_outcome { CONFIG_RUN = 0, CONFIG_EXIT = 1 }; /* EXIT: --help, --version */

/* Over the defaults that *c has.  CONFIG_*, or -EINVAL and the reason. */
int config_from_args(struct daemon_config *c, int argc, char **argv, struct err *e);
/* One setting, as in the file: "staging_max", "1G". */
int config_set(struct daemon_config *c, const char *key, const char *value, struct err *e);
