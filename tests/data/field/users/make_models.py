"""Writes the files of programs that run nowhere here, modelled on the pages that README.md links.

Usage: `python tests/data/field/users/make_models.py`; it needs argon2-cffi, bcrypt and cryptography.
"""

import base64
import csv
import hashlib
import io
import json
import os
from pathlib import Path

import argon2
import bcrypt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

FOLDER = Path(__file__).parent
PEOPLE = json.loads((FOLDER / "people.json").read_text())
SHORT = ["email", "full_name", "is_active"]
WESTERN = [person for person in PEOPLE if person["full_name"] != "李小龍"]
SIGNER_KEY, SEPARATOR, ROUNDS, MEM_COST = os.urandom(64), b"\x07", 8, 14
ID = "5a1f0f2e-0000-4000-8000-{:012d}"


def table(people: list[dict], names: list[str] = SHORT, **options: object) -> str:
    """Return people as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=str(options.pop("end", "\r\n")), **options)
    writer.writerow(names)
    writer.writerows(
        [str(person[name]).upper() if isinstance(person[name], bool) else person[name] for name in SHORT]
        for person in people
    )
    return text.getvalue()


def write(name: str, text: str, encoding: str = "utf-8") -> None:
    """Write a file without changing line ends."""
    (FOLDER / name).write_bytes(text.encode(encoding))


def password(person: dict) -> bytes:
    """Return the password of a person."""
    return f"secret-{person['id']}".encode()


def names_of(person: dict) -> tuple[str, str]:
    """Return the first and the last name."""
    first, _, last = (person["full_name"] or "").partition(" ")
    return first, last


def excel() -> None:
    """Excel's “Save as”, as Windows, Macintosh and European settings do it."""
    write("excel-utf8.csv", table(PEOPLE), "utf-8-sig")
    write("excel-semicolon.csv", table(WESTERN, delimiter=";"), "cp1252")
    write("excel-unicode.txt", table(PEOPLE, delimiter="\t"), "utf-16")
    one_line = [person for person in WESTERN if "\n" not in (person["full_name"] or "")]
    write("excel-macintosh.csv", table(one_line, end="\r"), "mac_roman")
    write("excel-sep.csv", "sep=;\r\n" + table(PEOPLE, delimiter=";"), "utf-8-sig")
    lines = table(one_line).splitlines()
    # Cells that were once filled, and a row that was emptied.
    write("excel-trailing.csv", "\r\n".join([f"{line},," for line in lines] + [",,,,", ""]), "utf-8-sig")
    write("excel-title.csv", "\r\n".join(["Staff 2026,,", ",,", *lines, ""]), "utf-8-sig")
    write("excel-totals.csv", "\r\n".join([*lines, ",,", "Total,8,", ""]), "utf-8-sig")
    write(
        "excel-german.csv",
        table(PEOPLE, delimiter=";").replace("TRUE", "WAHR").replace("FALSE", "FALSCH"),
        "utf-8-sig",
    )
    renamed = table(PEOPLE, ["E-Mail", "Full Name", "Is active"])
    write("google-sheets.csv", renamed.removesuffix("\r\n"))
    write(
        "google-sheets.tsv",
        table(one_line, ["E-Mail", "Full Name", "Is active"], delimiter="\t")
        .replace('""', '"')
        .replace('\t"', "\t")
        .replace('"\t', "\t"),
    )


def powershell() -> None:
    """Export-Csv: every value in quotes; before version 6, a line with the type comes first."""
    lines = []
    for row in [dict(zip(SHORT, SHORT, strict=True)), *PEOPLE]:
        values = (str(row[name]) if row[name] is not None else None for name in SHORT)
        lines.append(
            ",".join("" if value is None else '"' + value.replace('"', '""') + '"' for value in values)
        )
    text = "\r\n".join([*lines, ""])
    write("powershell-7.csv", text)
    write(
        "powershell-5.csv",
        "#TYPE System.Management.Automation.PSCustomObject\r\n"
        + text.replace("李小龍", "???").encode("ascii", "replace").decode(),
    )
    write(
        "powershell-5-utf8.csv",
        "#TYPE Selected.Microsoft.ActiveDirectory.Management.ADUser\r\n" + text,
        "utf-8-sig",
    )
    write(
        "powershell-5-unicode.csv",
        "#TYPE System.Data.DataRow\r\n"
        + text.replace('","', '"\t"').replace(",,", "\t\t").replace('",', '"\t'),
        "utf-16",
    )
    people = [
        {"Email": person["email"], "FullName": person["full_name"], "IsActive": person["is_active"]}
        for person in PEOPLE
    ]
    write("powershell.json", json.dumps(people, indent=4, ensure_ascii=False).replace("\n", "\r\n"), "utf-16")


def warehouses() -> None:
    """BigQuery, Snowflake, Redshift, SQL Server."""

    def bigquery(person: dict) -> dict:
        time = person["created_at"].replace("T", " ").replace("Z", " UTC")
        return {
            "id": str(person["id"]),
            "email": person["email"],
            **({"full_name": person["full_name"]} if person["full_name"] else {}),
            "is_active": person["is_active"],
            "created_at": time,
        }

    rows = [bigquery(person) for person in PEOPLE]
    write(
        "bigquery.json",
        "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows),
    )
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["id", "email", "full_name", "is_active", "created_at"], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({**row, "is_active": str(row["is_active"]).lower()} for row in rows)
    write("bigquery.csv", text.getvalue())
    lines = ['"ID","EMAIL","FULL_NAME","IS_ACTIVE","CREATED_AT"']
    unload = []
    for person in PEOPLE:
        time = person["created_at"].replace("T", " ").replace("Z", " +0000")
        active = str(person["is_active"]).upper()
        quoted = [
            "" if value is None else '"' + value.replace('"', '""') + '"'
            for value in (person["email"], person["full_name"])
        ]
        lines.append(",".join([f'"{person["id"]}"', *quoted, f'"{active}"', f'"{time}"']))
        unload.append(
            ",".join(
                [
                    person["email"],
                    (person["full_name"] or "\\N").replace(",", "\\,").replace("\n", "\\\n"),
                    active.lower(),
                ]
            )
        )
    write("snowflake.csv", "\n".join([*lines, ""]))
    write("snowflake-unload.csv", "\n".join(["EMAIL,FULL_NAME,IS_ACTIVE", *unload, ""]))
    write(
        "redshift.csv",
        "\n".join(
            [
                "email|full_name|is_active",
                *(
                    f"{person['email']}|{person['full_name'] or ''}|{'t' if person['is_active'] else 'f'}"
                    for person in PEOPLE[:6]
                ),
                "",
            ]
        ),
    )
    null = [
        (person["email"], person["full_name"] or "NULL", str(int(person["is_active"]))) for person in PEOPLE
    ]
    write(
        "sql-server.csv",
        "\r\n".join(
            [
                "email,full_name,is_active",
                *(",".join(row) for row in null if "," not in row[1] and "\n" not in row[1]),
                "",
            ]
        ),
        "utf-8-sig",
    )
    width = max(len(row[1]) for row in null)
    write(
        "sqlcmd.txt",
        "\r\n".join(
            [
                f"{'email':30} {'full_name':{width}} is_active",
                f"{'-' * 30} {'-' * width} ---------",
                *(f"{row[0]:30} {row[1]:{width}} {row[2]}" for row in null),
                "",
                "(10 rows affected)",
            ]
        ),
    )


def firescrypt(person: dict, salt: bytes) -> bytes:
    """Return Firebase's hash: the signer key, encrypted with a key from scrypt."""
    key = hashlib.scrypt(
        password(person), salt=salt + SEPARATOR, n=1 << MEM_COST, r=ROUNDS, p=1, maxmem=1 << 26, dklen=64
    )
    encryptor = Cipher(algorithms.AES(key[:32]), modes.CTR(bytes(16))).encryptor()
    return encryptor.update(SIGNER_KEY) + encryptor.finalize()


def stores() -> None:
    """Identity providers and user stores, with the passwords secret-1, secret-2 and so on."""
    url = lambda data: base64.urlsafe_b64encode(data).decode()  # noqa: E731
    firebase, auth0, kratos, cognito, okta = [], [], [], [], []
    supabase = [
        "id,aud,role,email,encrypted_password,email_confirmed_at,raw_user_meta_data,is_sso_user,banned_until"
    ]
    for person in PEOPLE:
        first, last = names_of(person)
        created, active, identifier = person["created_at"], person["is_active"], ID.format(person["id"])
        salt = os.urandom(10)
        bcrypt_hash = bcrypt.hashpw(password(person), bcrypt.gensalt(4)).decode()
        firebase.append(
            {
                "localId": f"uid{person['id']}",
                "email": person["email"],
                "emailVerified": True,
                "passwordHash": url(firescrypt(person, salt)),
                "salt": url(salt),
                "version": 0,
                "displayName": person["full_name"],
                "providerUserInfo": [
                    {"providerId": "password", "federatedId": person["email"], "rawId": person["email"]}
                ],
                "validSince": "1706693400",
                "createdAt": "1706693400123",
                "lastLoginAt": "1706693400123",
                **({} if active else {"disabled": True}),
            }
        )
        auth0.append(
            {
                "user_id": f"auth0|{person['id']:024x}",
                "email": person["email"],
                "email_verified": True,
                "name": person["full_name"] or person["email"],
                "given_name": first or None,
                "family_name": last or None,
                "nickname": person["email"].split("@")[0],
                "blocked": not active,
                "created_at": created,
                "Connection": "Username-Password-Authentication",
                "passwordHash": bcrypt_hash,
            }
        )
        kratos.append(
            {
                "id": identifier,
                "schema_id": "default",
                "schema_url": "https://auth.example.org/schemas/ZGVmYXVsdA",
                "state": "active" if active else "inactive",
                "traits": {"email": person["email"], "name": {"first": first, "last": last}},
                "credentials": {
                    "password": {
                        "type": "password",
                        "identifiers": [person["email"]],
                        "config": {
                            "hashed_password": argon2.PasswordHasher(
                                time_cost=1, memory_cost=1024, parallelism=1
                            ).hash(password(person))
                        },
                        "version": 0,
                    }
                },
                "verifiable_addresses": [
                    {
                        "id": identifier,
                        "value": person["email"],
                        "verified": True,
                        "via": "email",
                        "status": "completed",
                    }
                ],
                "metadata_public": None,
                "metadata_admin": None,
                "created_at": created,
                "updated_at": created,
            }
        )
        cognito.append(
            {
                "Username": identifier,
                "Attributes": [
                    {"Name": "email", "Value": person["email"]},
                    {"Name": "email_verified", "Value": "true"},
                    *([{"Name": "name", "Value": person["full_name"]}] if person["full_name"] else []),
                    {"Name": "sub", "Value": identifier},
                ],
                "UserCreateDate": created.replace("Z", "+00:00"),
                "UserLastModifiedDate": created.replace("Z", "+00:00"),
                "Enabled": active,
                "UserStatus": "CONFIRMED",
            }
        )
        okta.append(
            {
                "id": f"00u{person['id']:017d}",
                "status": "ACTIVE" if active else "SUSPENDED",
                "created": created,
                "activated": None,
                "profile": {
                    "login": person["email"],
                    "email": person["email"],
                    "firstName": first,
                    "lastName": last,
                    "mobilePhone": None,
                },
                "credentials": {"password": {}, "provider": {"type": "OKTA", "name": "OKTA"}},
            }
        )
        meta = json.dumps({"full_name": person["full_name"]}, ensure_ascii=False).replace('"', '""')
        banned = "" if active else "2126-01-01 00:00:00+00"
        supabase.append(
            f'{identifier},authenticated,authenticated,{person["email"]},{bcrypt_hash},{created.replace("T", " ").replace("Z", "+00")},"{meta}",f,{banned}'
        )
    write("firebase-accounts.json", json.dumps(firebase, ensure_ascii=False, indent=1))
    parameters = {
        "base64_signer_key": base64.b64encode(SIGNER_KEY).decode(),
        "base64_salt_separator": base64.b64encode(SEPARATOR).decode(),
        "rounds": ROUNDS,
        "mem_cost": MEM_COST,
    }
    write("firebase-parameters.json", json.dumps(parameters, indent=1))
    write("auth0-passwords.ndjson", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in auth0))
    for row in auth0:
        del row["passwordHash"]
    write("auth0.ndjson", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in auth0))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(auth0[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(auth0)
    write("auth0.csv", text.getvalue())
    write("kratos.json", json.dumps(kratos, ensure_ascii=False))
    write("cognito.json", json.dumps({"Users": cognito}, ensure_ascii=False, indent=4))
    write("okta.json", json.dumps(okta, ensure_ascii=False))
    write("supabase.csv", "\n".join([*supabase, ""]))


if __name__ == "__main__":
    for make in (excel, powershell, warehouses, stores):
        make()
