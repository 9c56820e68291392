#!/bin/sh
# SPDX-License-Identifier: MIT
# How many lines does minimal-vmm.c need to adopt snapd?  Those in the SNAPD branches,
# also those that stand for others; the directives only mark them.
# usage: count-added.sh FILE MAX
n=$(awk '/^#ifdef SNAPD$/ { on = 1; next }
	on && /^#(else|endif)/ { on = 0; next }
	on { n++ }
	END { print n }' "$1")
echo "$n added lines, fewer than $2 wanted"
[ "$n" -lt "$2" ]
