#!/bin/sh
# Unpack programs from Debian's packages into a folder, without installing them: nothing else on the machine
# changes, and no service starts. A program finds its libraries with LD_LIBRARY_PATH (tests/support/programs.py).
#
#     tools/debian_programs.sh FOLDER PACKAGE…
#
# Without apt, or if a package can't be downloaded, it prints a warning and exits with 1.
set -eu

folder=$1
shift

warn() {
	echo "WARNING: $1: tests that use $packages are skipped" >&2
	exit 1
}

# The package and those of its dependencies that are missing on this machine.
missing() {
	apt-get --simulate --no-install-recommends --reinstall install "$@" 2>/dev/null | awk '$1 == "Inst" { print $2 }' | sort -u
}

packages=$*
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || warn "this is not a Debian system"
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT
chmod 755 "$downloads"
cd "$downloads"

download() {
	names=$(missing "$@")
	# shellcheck disable=SC2086  # one argument for each name
	[ -n "$names" ] && apt-get --quiet=2 -o APT::Sandbox::User=root download $names >/dev/null 2>&1
}

# The lists of packages may be missing or old.
download "$@" || { [ "$(id -u)" = 0 ] && apt-get --quiet=2 update >/dev/null 2>&1 && download "$@"; } ||
	warn "apt can't download $packages; try: apt-get update"

cd - >/dev/null
rm -rf "$folder"
mkdir -p "$folder"
for package in "$downloads"/*.deb; do
	dpkg-deb --extract "$package" "$folder"
done
