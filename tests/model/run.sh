#!/bin/sh
# SPDX-License-Identifier: MIT
# Check a model with spin: no deadlock and no loss as it stands, and an error with each of
# its seeds.  77: spin is not installed.
#   run.sh MODEL CC
set -eu
model=$1 cc=$2
command -v spin >/dev/null || { echo "skipped: spin is not installed"; exit 77; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"

# The verdict of spin for one seed ("": none): ok, deadlock or loss.
verdict() {
	spin -a ${1:+-D$1} "$model" >spin.out 2>&1 || { head -3 spin.out >&2; echo broken; return; }
	$cc -O1 -w -DSAFETY -DCOLLAPSE -o pan pan.c
	./pan -m200000 >pan.out 2>&1
	if grep -q 'max search depth too small\|out of memory' pan.out; then echo "cut short"
	elif grep -q 'errors: 0' pan.out; then echo ok
	elif grep -q '^pan:1: invalid end state' pan.out; then echo deadlock
	elif grep -q '^pan:1: assertion violated' pan.out; then echo loss
	else head -5 pan.out >&2; echo broken; fi
}

failed=0
expect() {
	got=$(verdict "$1")
	states=$(sed -n 's/^ *\([0-9]*\) states, stored.*/\1/p' pan.out | head -1)
	echo "${1:-as it is}: $got, $states states"
	[ "$got" = "$2" ] || { echo "expected: $2"; failed=1; }
}
expect "" ok; [ $failed = 0 ]
sed -n 's/^ \*   \(SEED_[A-Z_]*\) .*: \(deadlock\|loss\)$/\1 \2/p' "$model" >seeds
[ -s seeds ]
while read -r seed error; do expect "$seed" "$error"; done <seeds
exit $failed
