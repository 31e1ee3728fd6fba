#!/usr/bin/env bash
# User data of a plain EC2 machine: installs transformers-flash-mla and starts `flash-mla serve` as a service.
#
# For an Ubuntu image with an NVIDIA driver (a Deep Learning Base AMI has one) and 60 GB of disk. Runs once, as root, at
# the first boot; its output is in /var/log/cloud-init-output.log. The server listens on 127.0.0.1 alone: reach it
# through SSM port forwarding, or put a proxy with TLS before it.
set -euo pipefail

MODEL=${MODEL:-deepseek-ai/DeepSeek-V2-Lite-Chat}
SOURCE=${SOURCE:-transformers-flash-mla[serve]}
TORCH=${TORCH:-torch==2.8.0} # for CUDA 12: drivers from 525 on
REQUIRE=${REQUIRE:-triton}   # a backend that has to run here: cuda on Hopper, triton on any GPU
HOME_DIR=/opt/flash-mla

export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv

# A user of its own, without a shell or a password.
id flash-mla >/dev/null 2>&1 \
    || useradd --system --create-home --home-dir "$HOME_DIR" --shell /usr/sbin/nologin flash-mla

python3 -m venv "$HOME_DIR/venv"
"$HOME_DIR/venv/bin/pip" install --no-cache-dir "$TORCH"
"$HOME_DIR/venv/bin/pip" install --no-cache-dir "$SOURCE"

# Before anything is downloaded: does the backend run? The exit status says what does not (docs/aws.md).
"$HOME_DIR/venv/bin/flash-mla" env --require "$REQUIRE"

# The key that requests must carry. Kept from the command line, which every user of the machine can read.
if [[ ! -s /etc/flash-mla.env ]]; then
    key=$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')
    install --mode=0600 /dev/null /etc/flash-mla.env
    printf 'FLASH_MLA_API_KEY=%s\n' "$key" >/etc/flash-mla.env
fi

cat >/etc/systemd/system/flash-mla.service <<UNIT
[Unit]
Description=flash-mla serve
After=network-online.target
Wants=network-online.target

[Service]
User=flash-mla
EnvironmentFile=/etc/flash-mla.env
ExecStart=$HOME_DIR/venv/bin/flash-mla serve $MODEL --host 127.0.0.1 --port 8000
Restart=on-failure
RestartSec=10
NoNewPrivileges=true
ProtectSystem=full
PrivateTmp=true

[Install]
WantedBy=multi-user.target
UNIT

systemctl daemon-reload
systemctl enable --now flash-mla.service
