#!/bin/sh
# Once, before anything else: certificates, passwords, and each site's images, every one into a volume of its own.
# Said again it keeps what there is.
set -eu
umask 077
volumes=/opt/demo/volumes

fedpeft-server init --data-dir "$volumes/server" --host server --operator demo --operator-identity "$volumes/operator"

secret() { python -c 'import secrets; print(secrets.token_urlsafe(24), end="")'; }

# Only PostgreSQL mounts the volume of its password, only Grafana that of its own; they run as other users.
if ! [ -e "$volumes/server/pgpass" ]; then
  password=$(secret)
  printf '%s' "$password" > "$volumes/postgres/password"
  chmod 755 "$volumes/postgres" && chmod 444 "$volumes/postgres/password"
  printf 'postgres:5432:fedpeft:fedpeft:%s\n' "$password" > "$volumes/server/pgpass"
fi
if ! [ -e "$volumes/grafana/password" ]; then
  secret > "$volumes/grafana/password"
  chmod 755 "$volumes/grafana" && chmod 444 "$volumes/grafana/password"
fi
if ! [ -e "$volumes/server/s3.env" ]; then
  password=$(secret)
  printf '%s' "$password" > "$volumes/s3/password"
  chmod 755 "$volumes/s3" && chmod 444 "$volumes/s3/password"
  printf 'AWS_ACCESS_KEY_ID=fedpeft\nAWS_SECRET_ACCESS_KEY=%s\n' "$password" > "$volumes/server/s3.env"
fi

# A vendor's drawings are a site's data; the held-out images are the evaluator's.
fedpeft partition /opt/demo/data/train.parquet --partition natural --column vendor --out /tmp/sites --json > /dev/null
give() { [ -e "$volumes/$1/data" ] || { cp -r "$2" "$volumes/$1/data.part" && mv "$volumes/$1/data.part" "$volumes/$1/data"; }; }
give site-1 /tmp/sites/emojione
give site-2 /tmp/sites/fluent-emoji-flat
give site-3 /tmp/sites/noto
give site-4 /tmp/sites/twemoji
give site-gpu /tmp/sites/fxemoji
give site-evaluator /opt/demo/data/test.parquet
cp -u /opt/demo/backbone/*.safetensors "$volumes/backbone/"
echo "certificates, passwords and data are in their volumes"
