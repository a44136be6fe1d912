// Keeps a page up to date: fragments come as server-sent events and are morphed in, so focus and scroll positions stay.
// Idiomorph compares by id; what the reader has opened or typed is left alone.
"use strict";

(() => {
  const main = document.querySelector("[data-events]");
  const away = document.getElementById("away");
  const listeners = [];
  window.fedpeft = { onFragment: (listener) => listeners.push(listener) };
  if (!main) return;

  const keep = {
    morphStyle: "innerHTML",
    callbacks: {
      beforeAttributeUpdated: (name, node) => !(name === "open" && node instanceof HTMLDetailsElement),
    },
  };

  function show(message) {
    const { id, html } = JSON.parse(message.data);
    const target = document.getElementById(id);
    if (!target) return;
    Idiomorph.morph(target, html, keep);
    for (const listener of listeners) listener(target);
  }

  function listen() {
    const source = new EventSource(main.dataset.events);
    source.addEventListener("fragment", show);
    source.addEventListener("open", () => { away.hidden = true; });
    source.addEventListener("error", async () => {
      away.hidden = false;
      // After a refusal a browser does not try again by itself: whoever was logged out is told, others wait.
      if (source.readyState !== EventSource.CLOSED) return;
      const answer = await fetch("/access", { method: "HEAD" }).catch(() => null);
      if (answer?.status === 401) window.location.reload();
      else window.setTimeout(listen, 3000);
    });
  }

  window.addEventListener("DOMContentLoaded", listen);
})();
