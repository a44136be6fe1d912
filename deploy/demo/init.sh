#!/bin/sh
# Once, before anything else: certificates, passwords, and each site's images, every one into a volume of its own.
# Said again it keeps what there is; whatever an interruption left half made is made anew.
set -eu
umask 077
volumes=/opt/demo/volumes

fedpeft-server init --data-dir "$volumes/server" --host server --operator demo --operator-identity "$volumes/operator"

secret() { python -c 'import secrets; print(secrets.token_urlsafe(24), end="")'; }
# put FILE MODE TEXT: the file is whole, or not there.
put() {
  rm -f "$1.part"
  printf '%s' "$3" > "$1.part"
  chmod "$2" "$1.part"
  mv -f "$1.part" "$1"
}

# Only PostgreSQL mounts the volume of its password, only Grafana that of its own; they run as other users. What the
# server is given comes last: where that is missing, the password is not in use yet, and is drawn anew.
if ! [ -e "$volumes/server/pgpass" ]; then
  password=$(secret)
  put "$volumes/postgres/password" 444 "$password"
  chmod 755 "$volumes/postgres"
  put "$volumes/server/pgpass" 600 "postgres:5432:fedpeft:fedpeft:$password
"
fi
if ! [ -e "$volumes/grafana/password" ]; then
  password=$(secret)
  chmod 755 "$volumes/grafana"
  put "$volumes/grafana/password" 444 "$password"
fi
if ! [ -e "$volumes/server/s3.env" ]; then
  password=$(secret)
  put "$volumes/s3/password" 444 "$password"
  chmod 755 "$volumes/s3"
  put "$volumes/server/s3.env" 600 "AWS_ACCESS_KEY_ID=fedpeft
AWS_SECRET_ACCESS_KEY=$password
"
fi

# A vendor's drawings are a site's data; the held-out images are the evaluator's.
rm -rf /tmp/sites
fedpeft partition /opt/demo/data/train.parquet --partition natural --column vendor --out /tmp/sites --json > /dev/null
give() {
  if ! [ -e "$volumes/$1/data" ]; then
    rm -rf "$volumes/$1/data.part"
    cp -r "$2" "$volumes/$1/data.part"
    mv "$volumes/$1/data.part" "$volumes/$1/data"
  fi
}
give site-1 /tmp/sites/emojione
give site-2 /tmp/sites/fluent-emoji-flat
give site-3 /tmp/sites/noto
give site-4 /tmp/sites/twemoji
give site-gpu /tmp/sites/fxemoji
give site-evaluator /opt/demo/data/test.parquet
for file in /opt/demo/backbone/*.safetensors; do
  copy=$volumes/backbone/${file##*/}
  if ! cmp -s "$file" "$copy"; then
    cp "$file" "$copy.part"
    mv -f "$copy.part" "$copy"
  fi
done
echo "certificates, passwords and data are in their volumes"
