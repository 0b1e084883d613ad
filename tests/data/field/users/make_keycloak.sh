#!/bin/sh
# Writes keycloak-*.json with Keycloak itself: it imports the people with passwords, hashes them, and exports them.
# Usage: make_keycloak.sh FOLDER, where FOLDER is an unpacked keycloak-quarkus-dist (Maven Central has it).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kc="$1/bin/kc.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for algorithm in argon2 pbkdf2-sha256 pbkdf2-sha512; do
    jq --arg algorithm "$algorithm" '
        {realm: ("people-" + $algorithm), enabled: true, passwordPolicy: "hashAlgorithm(\($algorithm)) and hashIterations(\(if $algorithm == "argon2" then 2 else 1000 end))",
         users: map((.full_name // "" | split(" ")) as $names
            | {username: (.email | split("@")[0]), email, enabled: .is_active, emailVerified: true,
               firstName: $names[0], lastName: ($names[1:] | join(" ")),
               credentials: [{type: "password", value: "secret-\(.id)"}]})}' \
        "$here/people.json" > "$work/in.json"
    "$kc" import --file "$work/in.json" --override true
    "$kc" export --file "$work/out.json" --realm "people-$algorithm" --users same_file
    # The parts of a realm that are not of users are long, and different in each version.
    jq '{id, realm, displayName, enabled, passwordPolicy, defaultRole, requiredCredentials, users, scopeMappings, clients: (.clients[:1]), smtpServer}' \
        "$work/out.json" > "$here/keycloak-$algorithm.json"
done
"$kc" export --dir "$work/dir" --realm people-argon2 --users different_files
cp "$work/dir"/people-argon2-users-0.json "$here/keycloak-users.json"
