#!/bin/sh
# localize.sh OBJCOPY AR CC… -- OUT.a IN.a…: one archive with one object, in which only
# snapd_* is global.
set -eu
objcopy=$1
ar=$2
shift 2
cc=
while [ "$1" != -- ]; do
	cc="$cc $1"
	shift
done
out=$2
shift 2
obj=${out%.a}.o
$cc -r -nostdlib -o "$obj" -Wl,--whole-archive "$@" -Wl,--no-whole-archive
"$objcopy" --wildcard --keep-global-symbol='snapd_*' "$obj"
rm -f "$out"
"$ar" rcs "$out" "$obj"
