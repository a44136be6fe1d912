// Times in the reader's own zone, themes, dialogs, and the form of a run file.
"use strict";

(() => {
  const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

  function span(seconds) {
    if (seconds < 60) return `${Math.round(seconds)} s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
    if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
    return `${Math.floor(seconds / 86400)} days`;
  }

  function relative(stamp) {
    const seconds = (Date.now() - stamp) / 1000;
    return seconds >= 0 ? `${span(seconds)} ago` : `in ${span(-seconds)}`;
  }

  function tell() {
    for (const time of document.querySelectorAll("time[data-when]")) {
      time.textContent = exact.format(new Date(time.dateTime));
    }
    for (const time of document.querySelectorAll("time[data-ago]")) {
      time.textContent = relative(Date.parse(time.dateTime));
      time.title = exact.format(new Date(time.dateTime));
    }
  }

  function themes() {
    const select = document.getElementById("theme");
    if (!select) return;
    select.value = document.documentElement.dataset.theme;
    select.addEventListener("change", () => {
      document.documentElement.dataset.theme = select.value;
      localStorage.setItem("fedpeft-theme", select.value);
      window.dispatchEvent(new Event("fedpeft-theme"));
    });
  }

  // What differs from button to button of one dialog stands in the button's data.
  function open(dialog, data) {
    for (const place of dialog.querySelectorAll("[data-fill]")) {
      place["value" in place ? "value" : "textContent"] = data[place.dataset.fill];
    }
    if (data.action) dialog.querySelector("form").action = data.action;
    dialog.showModal();
  }

  function dialogs() {
    document.addEventListener("click", (event) => {
      const button = event.target.closest("[data-opens]");
      if (button) open(document.getElementById(button.dataset.opens), button.dataset);
      if (event.target.closest("[data-closes]")) event.target.closest("dialog").close();
    });
  }

  function forms() {
    for (const form of document.querySelectorAll("form[data-busy]")) {
      form.addEventListener("submit", (event) => {
        const said = form.querySelector("[role=status]");
        if (said && event.submitter?.dataset.busy) said.textContent = event.submitter.dataset.busy;
        // Later, because a button that is disabled now would not be sent.
        window.setTimeout(() => form.querySelectorAll("button").forEach((button) => { button.disabled = true; }));
      });
    }
    const file = document.getElementById("file");
    file?.addEventListener("change", async () => {
      if (!file.files.length) return;
      document.getElementById("text").value = await file.files[0].text();
      file.value = "";
    });
  }

  window.addEventListener("DOMContentLoaded", () => {
    themes();
    dialogs();
    forms();
    tell();
    window.setInterval(tell, 1000);
    window.fedpeft?.onFragment(tell);
  });
})();
