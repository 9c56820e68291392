# SPDX-License-Identifier: MIT
# bash completion of snapctl
_snapctl_words() {
	snapctl "$@" --json 2>/dev/null
}

_snapctl_vms() {
	_snapctl_words vms | sed -n 's/^      "name": "\(.*\)",*$/\1/p'
}

_snapctl_policies() {
	_snapctl_words policy list | sed -n 's/^      "name": "\(.*\)",*$/\1/p'
}

# Of the VM, if one is named.
_snapctl_snaps() {
	_snapctl_words list "$@" | awk -F'"' '/^      "id":/ {gsub(/[^0-9]/, "", $3); id = $3}
		/^      "vm":/ {vm = $4; print id; print vm "@" id}
		/^      "name":/ && $4 != "" {print vm "@" $4}'
}

# Those that can be stopped.
_snapctl_jobs() {
	_snapctl_words jobs | awk -F'"' '/^      "id":/ {gsub(/[^0-9]/, "", $3); id = $3}
		/^      "state":/ && $4 ~ /queued|running/ {print id}'
}

_snapctl() {
	local line=${COMP_LINE:0:COMP_POINT} verb='' pos=() npos i word words cur prev
	local verbs='vms tag snapshot self-check list show diff rollback restore export import set delete prune verify policy store backup top doctor jobs cancel version'
	local settings='vms vm_tags owner every schedule recovery_point jitter timezone missed skip_unchanged self_check_every tags pre_hook post_hook hook_timeout consistency min_free compression max_pause max_paused max_overhead keep_last keep_hourly keep_daily keep_weekly keep_monthly keep_yearly keep_within keep_tags keep_grid backup backup_hold backup_keep_last backup_keep_hourly backup_keep_daily backup_keep_weekly backup_keep_monthly backup_keep_yearly backup_keep_within backup_keep_tags backup_keep_grid backup_prune backup_verify backup_verify_data paused'
	local options='--socket --json --no-progress --help'

	COMPREPLY=()
	# Not COMP_WORDS: bash takes "@" and "=" for the beginning of a word.
	read -ra words <<<"$line"
	[[ $line == *[[:blank:]] ]] && words+=('')
	cur=${words[-1]} prev=${words[-2]}
	for ((i = 1; i < ${#words[@]} - 1; i++)); do
		word=${words[i]}
		case $word in
		--socket | --name | --note | --tag | --snapshot-name | --add-tag | --remove-tag | --vm | --keep-* | --repository | --rate | --compression | --set | --add | --remove | --delay | --sort) ((i++)) ;;
		--self-check) [ "$verb" = policy ] && ((i++)) ;;
		-*) ;;
		*) if [ -z "$verb" ]; then verb=$word; else pos+=("$word"); fi ;;
		esac
	done
	npos=${#pos[@]}
	case $verb in
	vms) options+=' --tag' ;;
	tag) options+=' --set --add --remove' ;;
	snapshot) options+=' --name --note --tag --pin --compression --self-check' ;;
	set) options+=' --name --note --tag --add-tag --remove-tag --pin --unpin' ;;
	delete) options+=' --vm' ;;
	prune) options+=' --keep-last --keep-hourly --keep-daily --keep-weekly --keep-monthly --keep-yearly --keep-within --keep-tag --keep-grid --unbacked --dry-run' ;;
	list) options+=' --tree --flat' ;;
	diff) options+=' --all' ;;
	rollback) options+=' --check --other-vm' ;;
	policy) options+=' --wait --self-check' ;;
	restore) options+=' --name --print --disk --mac --force' ;;
	export) options+=' --force' ;;
	import) options+=' --name --snapshot-name --note --tag' ;;
	show) options+=' --space' ;;
	top) options+=' --once --delay --sort' ;;
	store) options+=' --read-data --dry-run --exact --rate --status --now --pause --resume --cancel --wait --store --encryption-key --new-key' ;;
	backup) options+=' --repository --stdout --stdin --name --read-data --vm --prune --dry-run' ;;
	verify) options+=' --digest' ;;
	esac
	case $prev in
	--socket) mapfile -t COMPREPLY < <(compgen -f -- "$cur") && return ;;
	--sort) mapfile -t COMPREPLY < <(compgen -W 'name state dirty behind age pause still epochs full' -- "$cur") && return ;;
	--vm) mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_vms)" -- "$cur") && return ;;
	--name | --note | --tag | --snapshot-name | --add-tag | --remove-tag | --set | --add | --remove | --keep-*) return ;;
	esac
	if [[ $cur == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
		return
	fi
	case $verb:$npos in
	:*) mapfile -t COMPREPLY < <(compgen -W "$verbs" -- "$cur") ;;
	tag:0 | snapshot:0 | self-check:0 | list:0 | rollback:0 | prune:0) mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_vms)" -- "$cur") ;;
	show:0 | diff:[01] | restore:0 | export:0 | set:0 | delete:* | verify:0)
		mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_snaps)" -- "$cur")
		;;
	rollback:1) mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_snaps "${pos[0]}")" -- "$cur") ;;
	export:1 | import:0) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
	policy:0) mapfile -t COMPREPLY < <(compgen -W 'list show set run pause resume rm' -- "$cur") ;;
	policy:1) mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_policies)" -- "$cur") ;;
	policy:*)
		case ${pos[0]} in
		run) mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_vms)" -- "$cur") ;;
		set)
			mapfile -t COMPREPLY < <(compgen -S = -W "$settings" -- "$cur")
			compopt -o nospace 2>/dev/null
			;;
		esac
		;;
	backup:0) mapfile -t COMPREPLY < <(compgen -W 'push pull list verify forget prune status' -- "$cur") ;;
	store:0) mapfile -t COMPREPLY < <(compgen -W 'stats gc check scrub repair rebuild-index rekey' -- "$cur") ;;
	cancel:0) mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_jobs)" -- "$cur") ;;
	esac
	# What stands before the last "@" is a word of its own to bash, and stays.
	[[ $cur == *@* && $COMP_WORDBREAKS == *@* ]] && COMPREPLY=("${COMPREPLY[@]#"${cur%@*}"}")
	return 0
}
complete -F _snapctl snapctl
