"""The dashboards of FedPEFT, made with Grafana's builders (grafana-foundation-sdk); `../generate.py` writes them."""
