# SPDX-License-Identifier: MIT
# fish completion of snapctl
function __snapctl_vms
	snapctl vms --json 2>/dev/null | string match -rg '^      "name": "(.*)",?$'
end

function __snapctl_snaps
	snapctl list --json 2>/dev/null | awk -F'"' '/^      "id":/ {gsub(/[^0-9]/, "", $3); id = $3}
		/^      "vm":/ {vm = $4; print id; print vm "@" id}
		/^      "name":/ && $4 != "" {print vm "@" $4}'
end

function __snapctl_jobs
	snapctl jobs --json 2>/dev/null | string match -rg '^      "id": ([0-9]+),?$'
end

complete -c snapctl -f
complete -c snapctl -l socket -r -F -d 'socket of the service'
complete -c snapctl -l json -d 'print JSON'
complete -c snapctl -l no-progress -d 'no progress bar'
complete -c snapctl -l help -d help

complete -c snapctl -n __fish_use_subcommand -a vms -d 'list the attached VMs'
complete -c snapctl -n __fish_use_subcommand -a tag -d 'show and change the tags of a VM'
complete -c snapctl -n __fish_use_subcommand -a snapshot -d 'take a snapshot of a running VM'
complete -c snapctl -n __fish_use_subcommand -a self-check -d 'compare all memory with the store'
complete -c snapctl -n __fish_use_subcommand -a list -d 'list snapshots'
complete -c snapctl -n __fish_use_subcommand -a show -d 'tell all about a snapshot'
complete -c snapctl -n __fish_use_subcommand -a diff -d 'which memory differs'
complete -c snapctl -n __fish_use_subcommand -a rollback -d 'bring a running VM back'
complete -c snapctl -n __fish_use_subcommand -a restore -d 'start a new VMM from a snapshot'
complete -c snapctl -n __fish_use_subcommand -a export -d 'write memory and state to files'
complete -c snapctl -n __fish_use_subcommand -a import -d 'read what export wrote'
complete -c snapctl -n __fish_use_subcommand -a set -d 'change name, note, tags, pin'
complete -c snapctl -n __fish_use_subcommand -a delete -d 'forget snapshots, or a VM'
complete -c snapctl -n __fish_use_subcommand -a prune -d 'delete what no rule keeps'
complete -c snapctl -n __fish_use_subcommand -a verify -d 'read and check every page'
complete -c snapctl -n __fish_use_subcommand -a policy -d 'periodic snapshots'
complete -c snapctl -n __fish_use_subcommand -a store -d 'figures of the store'
complete -c snapctl -n __fish_use_subcommand -a top -d 'live figures'
complete -c snapctl -n __fish_use_subcommand -a doctor -d 'check this host'
complete -c snapctl -n __fish_use_subcommand -a jobs -d 'list jobs'
complete -c snapctl -n __fish_use_subcommand -a cancel -d 'cancel a job'
complete -c snapctl -n __fish_use_subcommand -a version -d 'versions'

complete -c snapctl -n '__fish_seen_subcommand_from vms' -l tag -x -d 'only with this tag'
complete -c snapctl -n '__fish_seen_subcommand_from tag' -l set -x -d 'in place of all'
complete -c snapctl -n '__fish_seen_subcommand_from tag' -l add -x -d 'more tags'
complete -c snapctl -n '__fish_seen_subcommand_from tag' -l remove -x -d 'fewer tags'
complete -c snapctl -n '__fish_seen_subcommand_from snapshot' -l name -x -d 'name'
complete -c snapctl -n '__fish_seen_subcommand_from snapshot' -l note -x -d 'note'
complete -c snapctl -n '__fish_seen_subcommand_from snapshot' -l tag -x -d 'tags'
complete -c snapctl -n '__fish_seen_subcommand_from snapshot' -l self-check -d 'compare all memory'
complete -c snapctl -n '__fish_seen_subcommand_from list' -l tree -d 'a tree'
complete -c snapctl -n '__fish_seen_subcommand_from list' -l flat -d 'a table'
complete -c snapctl -n '__fish_seen_subcommand_from diff' -l all -d 'every range'
complete -c snapctl -n '__fish_seen_subcommand_from rollback' -l check -d 'compare afterwards'
complete -c snapctl -n '__fish_seen_subcommand_from restore' -l name -x -d 'new name'
complete -c snapctl -n '__fish_seen_subcommand_from restore' -l print -d 'print the command'
complete -c snapctl -n '__fish_seen_subcommand_from restore' -l disk -x -d 'other disk images'
complete -c snapctl -n '__fish_seen_subcommand_from restore' -l mac -x -d 'other addresses'
complete -c snapctl -n '__fish_seen_subcommand_from restore' -l force -d 'another QEMU, too'
complete -c snapctl -n '__fish_seen_subcommand_from export' -l force -d 'replace files'
complete -c snapctl -n '__fish_seen_subcommand_from import' -l name -x -d 'VM'
complete -c snapctl -n '__fish_seen_subcommand_from import' -l snapshot-name -x -d 'name'
complete -c snapctl -n '__fish_seen_subcommand_from import' -l note -x -d 'note'
complete -c snapctl -n '__fish_seen_subcommand_from import' -l tag -x -d 'tags'
complete -c snapctl -n '__fish_seen_subcommand_from verify' -l digest -d 'SHA-256 of memory'

complete -c snapctl -n '__fish_seen_subcommand_from snapshot' -l pin -d 'pin it'
complete -c snapctl -n '__fish_seen_subcommand_from set' -l name -x -d 'name'
complete -c snapctl -n '__fish_seen_subcommand_from set' -l note -x -d 'note'
complete -c snapctl -n '__fish_seen_subcommand_from set' -l tag -x -d 'tags'
complete -c snapctl -n '__fish_seen_subcommand_from set' -l add-tag -x -d 'more tags'
complete -c snapctl -n '__fish_seen_subcommand_from set' -l remove-tag -x -d 'fewer tags'
complete -c snapctl -n '__fish_seen_subcommand_from set' -l pin -d 'pin it'
complete -c snapctl -n '__fish_seen_subcommand_from set' -l unpin -d 'unpin it'
complete -c snapctl -n '__fish_seen_subcommand_from delete' -l vm -x -a '(__snapctl_vms)' -d 'a whole VM'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-last -x -d 'keep by last'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-hourly -x -d 'keep by hourly'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-daily -x -d 'keep by daily'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-weekly -x -d 'keep by weekly'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-monthly -x -d 'keep by monthly'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-yearly -x -d 'keep by yearly'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-within -x -d 'keep by within'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-tag -x -d 'keep by tag'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l keep-grid -x -d 'keep by grid'
complete -c snapctl -n '__fish_seen_subcommand_from prune' -l dry-run -d 'only tell'

complete -c snapctl -n '__fish_seen_subcommand_from top' -l once -d 'one frame'
complete -c snapctl -n '__fish_seen_subcommand_from top' -l delay -x -d 'between samples'
complete -c snapctl -n '__fish_seen_subcommand_from top' -l sort -x -a 'name state dirty behind age pause still epochs full' -d 'order'
complete -c snapctl -n '__fish_seen_subcommand_from store' -l read-data -d 'read every page'
complete -c snapctl -n '__fish_seen_subcommand_from show' -l space -d 'what it alone holds'
complete -c snapctl -n '__fish_seen_subcommand_from store' -l dry-run -d 'only tell'
complete -c snapctl -n '__fish_seen_subcommand_from store' -l exact -d 'whose the bytes are'
complete -c snapctl -n '__fish_seen_subcommand_from store' -l rate -x -d 'bytes a second'

complete -c snapctl -n '__fish_seen_subcommand_from tag snapshot self-check list rollback prune' -a '(__snapctl_vms)'
complete -c snapctl -n '__fish_seen_subcommand_from show diff rollback restore export set delete verify' -a '(__snapctl_snaps)'
complete -c snapctl -n '__fish_seen_subcommand_from export import' -F
complete -c snapctl -n '__fish_seen_subcommand_from policy' -a 'list show set run pause resume rm'
complete -c snapctl -n '__fish_seen_subcommand_from store' -a 'stats gc check repair'
complete -c snapctl -n '__fish_seen_subcommand_from cancel' -a '(__snapctl_jobs)'
