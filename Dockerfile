# A machine with NVIDIA GPUs. The CUDA libraries come with torch; the host needs only the driver and its container toolkit.
#
#   docker build -t kotoba-whisper-training .
#   docker run --gpus all --ipc host -v "$PWD:/data" -v "$HOME/.cache:/root/.cache" -it kotoba-whisper-training bash
#
# The container starts in the current directory, and the scripts are in /opt/kotoba-whisper. Downloads, models and the
# login of `hf auth login` are those of the host's ~/.cache. --ipc host gives the data loader's processes the shared
# memory that they need.
FROM python:3.12-slim

# git for clones of model repositories; a compiler for --torch_compile.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/kotoba-whisper
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY *.py kotoba_whisper_training_v1.0.sh LICENSE ./

ENV PATH="/opt/kotoba-whisper:${PATH}"
WORKDIR /data
