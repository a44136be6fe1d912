#!/bin/sh
# What the official image's entry point does with POSTGRES_USER, POSTGRES_DB, POSTGRES_PASSWORD_FILE and PGDATA.
set -eu
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
if ! [ -s "$PGDATA/made" ]; then
  initdb --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth=scram-sha-256 --encoding=UTF8 >/dev/null
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  echo "CREATE DATABASE $POSTGRES_DB" | postgres --single postgres >/dev/null
  date > "$PGDATA/made"
fi
exec postgres -c "listen_addresses=*" -c unix_socket_directories=/tmp
