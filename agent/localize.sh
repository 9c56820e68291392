#!/bin/sh
# localize.sh CC… -- OUT.a IN.a…: one archive with one object, in which only
# snapd_* is global.
set -eu
cc=
while [ "$1" != -- ]; do
	cc="$cc $1"
	shift
done
out=$2
shift 2
obj=${out%.a}.o
$cc -r -nostdlib -o "$obj" -Wl,--whole-archive "$@" -Wl,--no-whole-archive
"${OBJCOPY:-objcopy}" --wildcard --keep-global-symbol='snapd_*' "$obj"
rm -f "$out"
"${AR:-ar}" rcs "$out" "$obj"
