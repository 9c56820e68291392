# SPDX-License-Identifier: MIT
# fish completion of snapctl
function __snapctl_vms
	snapctl vms --json 2>/dev/null | string match -rg '^      "name": "(.*)",?$'
end

function __snapctl_snaps
	snapctl list $argv --json 2>/dev/null | awk -F'"' '/^      "id":/ {gsub(/[^0-9]/, "", $3); id = $3}
		/^      "vm":/ {vm = $4; print id; print vm "@" id}
		/^      "name":/ && $4 != "" {print vm "@" $4}'
end

# Those that can be stopped.
function __snapctl_jobs
	snapctl jobs --json 2>/dev/null | awk -F'"' '/^      "id":/ {gsub(/[^0-9]/, "", $3); id = $3}
		/^      "state":/ && $4 ~ /queued|running/ {print id}'
end

function __snapctl_policies
	snapctl policy list --json 2>/dev/null | string match -rg '^      "name": "(.*)",?$'
end

# The verb and what follows it, without options.
function __snapctl_words
	set -l words (commandline -opc)
	set -e words[1]
	string match -v -- '-*' $words
end

# Is one of these the verb?
function __snapctl_verb
	set -l words (__snapctl_words)
	test (count $words) -gt 0; and contains -- $words[1] $argv
end

# Is one of these the verb, and so many words (or one of several numbers, "0,1") behind it?
function __snapctl_at
	set -l words (__snapctl_words)
	test (count $words) -gt 0; and contains -- $words[1] $argv[2..]
	and contains -- (math (count $words) - 1) (string split , $argv[1])
end

# Is the verb the first, and the word behind it one of the others?
function __snapctl_under
	set -l words (__snapctl_words)
	test (count $words) -gt 1; and test $words[1] = $argv[1]; and contains -- $words[2] $argv[2..]
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
complete -c snapctl -n __fish_use_subcommand -a backup -d 'snapshots in a bucket or a directory'
complete -c snapctl -n __fish_use_subcommand -a top -d 'live figures'
complete -c snapctl -n __fish_use_subcommand -a doctor -d 'check this host'
complete -c snapctl -n __fish_use_subcommand -a jobs -d 'list jobs'
complete -c snapctl -n __fish_use_subcommand -a cancel -d 'cancel a job'
complete -c snapctl -n __fish_use_subcommand -a version -d 'versions'

complete -c snapctl -n '__snapctl_verb vms' -l tag -x -d 'only with this tag'
complete -c snapctl -n '__snapctl_verb tag' -l set -x -d 'in place of all'
complete -c snapctl -n '__snapctl_verb tag' -l add -x -d 'more tags'
complete -c snapctl -n '__snapctl_verb tag' -l remove -x -d 'fewer tags'
complete -c snapctl -n '__snapctl_verb snapshot' -l name -x -d 'name'
complete -c snapctl -n '__snapctl_verb snapshot' -l note -x -d 'note'
complete -c snapctl -n '__snapctl_verb snapshot' -l tag -x -d 'tags'
complete -c snapctl -n '__snapctl_verb snapshot' -l compression -x -a 'none lz4 zstd' -d 'of what it stores'
complete -c snapctl -n '__snapctl_verb snapshot' -l self-check -d 'compare all memory'
complete -c snapctl -n '__snapctl_verb list' -l tree -d 'a tree'
complete -c snapctl -n '__snapctl_verb list' -l flat -d 'a table'
complete -c snapctl -n '__snapctl_verb diff' -l all -d 'every range'
complete -c snapctl -n '__snapctl_verb rollback' -l check -d 'compare afterwards'
complete -c snapctl -n '__snapctl_verb restore' -l name -x -d 'new name'
complete -c snapctl -n '__snapctl_verb restore' -l print -d 'print the command'
complete -c snapctl -n '__snapctl_verb restore' -l disk -x -d 'other disk images'
complete -c snapctl -n '__snapctl_verb restore' -l mac -x -d 'other addresses'
complete -c snapctl -n '__snapctl_verb restore' -l force -d 'another QEMU, too'
complete -c snapctl -n '__snapctl_verb export' -l force -d 'replace files'
complete -c snapctl -n '__snapctl_verb import' -l name -x -d 'VM'
complete -c snapctl -n '__snapctl_verb import' -l snapshot-name -x -d 'name'
complete -c snapctl -n '__snapctl_verb import' -l note -x -d 'note'
complete -c snapctl -n '__snapctl_verb import' -l tag -x -d 'tags'
complete -c snapctl -n '__snapctl_verb verify' -l digest -d 'SHA-256 of memory'

complete -c snapctl -n '__snapctl_verb snapshot' -l pin -d 'pin it'
complete -c snapctl -n '__snapctl_verb set' -l name -x -d 'name'
complete -c snapctl -n '__snapctl_verb set' -l note -x -d 'note'
complete -c snapctl -n '__snapctl_verb set' -l tag -x -d 'tags'
complete -c snapctl -n '__snapctl_verb set' -l add-tag -x -d 'more tags'
complete -c snapctl -n '__snapctl_verb set' -l remove-tag -x -d 'fewer tags'
complete -c snapctl -n '__snapctl_verb set' -l pin -d 'pin it'
complete -c snapctl -n '__snapctl_verb set' -l unpin -d 'unpin it'
complete -c snapctl -n '__snapctl_verb delete' -l vm -x -a '(__snapctl_vms)' -d 'a whole VM'
complete -c snapctl -n '__snapctl_verb prune' -l keep-last -x -d 'keep by last'
complete -c snapctl -n '__snapctl_verb prune' -l keep-hourly -x -d 'keep by hourly'
complete -c snapctl -n '__snapctl_verb prune' -l keep-daily -x -d 'keep by daily'
complete -c snapctl -n '__snapctl_verb prune' -l keep-weekly -x -d 'keep by weekly'
complete -c snapctl -n '__snapctl_verb prune' -l keep-monthly -x -d 'keep by monthly'
complete -c snapctl -n '__snapctl_verb prune' -l keep-yearly -x -d 'keep by yearly'
complete -c snapctl -n '__snapctl_verb prune' -l keep-within -x -d 'keep by within'
complete -c snapctl -n '__snapctl_verb prune' -l keep-tag -x -d 'keep by tag'
complete -c snapctl -n '__snapctl_verb prune' -l keep-grid -x -d 'keep by grid'
complete -c snapctl -n '__snapctl_verb prune' -l unbacked -d 'not backed up yet, too'
complete -c snapctl -n '__snapctl_verb prune' -l dry-run -d 'only tell'

complete -c snapctl -n '__snapctl_verb top' -l once -d 'one frame'
complete -c snapctl -n '__snapctl_verb top' -l delay -x -d 'between samples'
complete -c snapctl -n '__snapctl_verb top' -l sort -x -a 'name state dirty behind age pause still epochs full' -d 'order'
complete -c snapctl -n '__snapctl_verb store' -l read-data -d 'read every page'
complete -c snapctl -n '__snapctl_verb show' -l space -d 'what it alone holds'
complete -c snapctl -n '__snapctl_verb store' -l dry-run -d 'only tell'
complete -c snapctl -n '__snapctl_verb store' -l exact -d 'whose the bytes are'
complete -c snapctl -n '__snapctl_verb store' -l status -d 'where the scrub stands'
complete -c snapctl -n '__snapctl_verb store' -l now -d 'begin a scrub'
complete -c snapctl -n '__snapctl_verb store' -l pause -d 'no scrub reads'
complete -c snapctl -n '__snapctl_verb store' -l resume -d 'scrubs read again'
complete -c snapctl -n '__snapctl_verb store' -l cancel -d 'drop the scrub under way'
complete -c snapctl -n '__snapctl_verb store' -l wait -d 'until the scrub ended'
complete -c snapctl -n '__snapctl_verb backup' -l repository -x -d 'repository'
complete -c snapctl -n '__snapctl_verb backup' -l stdout -d 'stdout'
complete -c snapctl -n '__snapctl_verb backup' -l stdin -d 'stdin'
complete -c snapctl -n '__snapctl_verb backup' -l name -x -d 'name'
complete -c snapctl -n '__snapctl_verb backup' -l read-data -d 'read data'
complete -c snapctl -n '__snapctl_verb backup' -l vm -x -d 'vm'
complete -c snapctl -n '__snapctl_verb backup' -l prune -d 'prune'
complete -c snapctl -n '__snapctl_verb backup' -l dry-run -d 'dry run'
complete -c snapctl -n '__snapctl_verb store' -l rate -x -d 'bytes a second'
complete -c snapctl -n '__snapctl_verb store' -l store -r -d 'of a service that does not run'
complete -c snapctl -n '__snapctl_verb store' -l encryption-key -r -d 'its key'
complete -c snapctl -n '__snapctl_verb store' -l new-key -r -d 'its key from now on'

complete -c snapctl -n '__snapctl_verb rollback' -l other-vm -d 'of another VM, too'
complete -c snapctl -n '__snapctl_verb policy' -l wait -d 'until it is done'
complete -c snapctl -n '__snapctl_verb policy' -l self-check -x -d 'compare all memory every so many snapshots'

complete -c snapctl -n '__snapctl_at 0 tag snapshot self-check list rollback prune' -a '(__snapctl_vms)'
complete -c snapctl -n '__snapctl_at 0 show restore export set verify' -a '(__snapctl_snaps)'
complete -c snapctl -n '__snapctl_at 0,1 diff' -a '(__snapctl_snaps)'
complete -c snapctl -n '__snapctl_at 1 rollback' -a '(__snapctl_snaps (__snapctl_words)[2])'
complete -c snapctl -n '__snapctl_verb delete' -a '(__snapctl_snaps)'
complete -c snapctl -n '__snapctl_at 1 export' -F
complete -c snapctl -n '__snapctl_at 0 import' -F
complete -c snapctl -n '__snapctl_at 0 policy' -a 'list show set run pause resume rm'
complete -c snapctl -n '__snapctl_at 1 policy; and not __snapctl_under policy list' -a '(__snapctl_policies)'
complete -c snapctl -n '__snapctl_at 2 policy; and __snapctl_under policy run' -a '(__snapctl_vms)'
complete -c snapctl -n '__snapctl_under policy set; and not __snapctl_at 1 policy' -a 'vms= vm_tags= owner= every= schedule= recovery_point= jitter= timezone= missed= skip_unchanged= self_check_every= tags= pre_hook= post_hook= hook_timeout= consistency= min_free= compression= max_pause= max_paused= max_overhead= keep_last= keep_hourly= keep_daily= keep_weekly= keep_monthly= keep_yearly= keep_within= keep_tags= keep_grid= backup= backup_hold= backup_keep_last= backup_keep_hourly= backup_keep_daily= backup_keep_weekly= backup_keep_monthly= backup_keep_yearly= backup_keep_within= backup_keep_tags= backup_keep_grid= backup_prune= backup_verify= backup_verify_data= paused='
complete -c snapctl -n '__snapctl_at 0 store' -a 'stats gc check scrub repair rebuild-index rekey'
complete -c snapctl -n '__snapctl_at 0 backup' -a 'push pull list verify forget prune status'
complete -c snapctl -n '__snapctl_at 0 cancel' -a '(__snapctl_jobs)'
