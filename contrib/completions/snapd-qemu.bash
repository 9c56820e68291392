# bash completion for snapd-qemu                           -*- shell-script -*-
_snapd_qemu()
{
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} i
	local options='--vm --socket --restore --recorded --force --disk --mac --print --version --help'

	for ((i = 1; i < COMP_CWORD; i++)); do
		if [[ ${COMP_WORDS[i]} == -- ]]; then
			_command_offset $((i + 1))
			return
		fi
	done
	case $prev in
	--vm | --restore | --mac) return ;;
	--socket | --disk)
		mapfile -t COMPREPLY < <(compgen -f -- "$cur")
		return
		;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$options --" -- "$cur")
}
complete -F _snapd_qemu snapd-qemu
