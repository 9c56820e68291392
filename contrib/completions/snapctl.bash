# SPDX-License-Identifier: MIT
# bash completion of snapctl
_snapctl_words() {
	snapctl "$@" --json 2>/dev/null
}

_snapctl_vms() {
	_snapctl_words vms | sed -n 's/^      "name": "\(.*\)",*$/\1/p'
}

_snapctl_snaps() {
	_snapctl_words list | awk -F'"' '/^      "id":/ {gsub(/[^0-9]/, "", $3); id = $3}
		/^      "vm":/ {vm = $4; print id; print vm "@" id}
		/^      "name":/ && $4 != "" {print vm "@" $4}'
}

_snapctl_jobs() {
	_snapctl_words jobs | sed -n 's/^      "id": \([0-9]*\),*$/\1/p'
}

_snapctl() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} verb='' npos=0 i word
	local verbs='vms tag snapshot self-check list show diff rollback restore export import set delete prune verify policy store backup top doctor jobs cancel version'
	local options='--socket --json --no-progress --help'

	COMPREPLY=()
	for ((i = 1; i < COMP_CWORD; i++)); do
		word=${COMP_WORDS[i]}
		case $word in
		--socket | --name | --note | --tag | --snapshot-name | --add-tag | --remove-tag | --vm | --keep-* | --repository | --rate | --set | --add | --remove | --delay | --sort) ((i++)) ;;
		-*) ;;
		*) if [ -z "$verb" ]; then verb=$word; else ((npos++)); fi ;;
		esac
	done
	case $verb in
	vms) options+=' --tag' ;;
	tag) options+=' --set --add --remove' ;;
	snapshot) options+=' --name --note --tag --pin --self-check' ;;
	set) options+=' --name --note --tag --add-tag --remove-tag --pin --unpin' ;;
	delete) options+=' --vm' ;;
	prune) options+=' --keep-last --keep-hourly --keep-daily --keep-weekly --keep-monthly --keep-yearly --keep-within --keep-tag --keep-grid --unbacked --dry-run' ;;
	list) options+=' --tree --flat' ;;
	diff) options+=' --all' ;;
	rollback) options+=' --check' ;;
	restore) options+=' --name --print --disk --mac --force' ;;
	export) options+=' --force' ;;
	import) options+=' --name --snapshot-name --note --tag' ;;
	show) options+=' --space' ;;
	top) options+=' --once --delay --sort' ;;
	store) options+=' --read-data --dry-run --exact --rate --store --encryption-key --new-key' ;;
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
	show:0 | diff:[01] | rollback:1 | restore:0 | export:0 | set:0 | delete:* | verify:0)
		mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_snaps)" -- "$cur")
		;;
	export:1 | import:0) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
	policy:0) mapfile -t COMPREPLY < <(compgen -W 'list show set run pause resume rm' -- "$cur") ;;
	backup:0) mapfile -t COMPREPLY < <(compgen -W 'push pull list verify forget prune status' -- "$cur") ;;
	store:0) mapfile -t COMPREPLY < <(compgen -W 'stats gc check repair rebuild-index rekey' -- "$cur") ;;
	cancel:0) mapfile -t COMPREPLY < <(compgen -W "$(_snapctl_jobs)" -- "$cur") ;;
	esac
}
complete -F _snapctl snapctl
