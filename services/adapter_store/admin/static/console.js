// What the pages do beyond links and forms. Everything works without it, but for copying.
"use strict";

// Nobody looks: ask the server nothing.
document.addEventListener("htmx:config:request", (event) => {
  if (document.hidden) event.preventDefault();
});

// The refreshed part stays as it was while the store is away; say so.
const offline = document.getElementById("offline");
const setOffline = (is) => { if (offline) offline.hidden = !is; };
document.addEventListener("htmx:error", () => setOffline(true));
document.addEventListener("htmx:response:error", () => setOffline(true));
document.addEventListener("htmx:after:swap", () => setOffline(false));

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
});

// A form with data-confirm is asked about first.
const dialog = document.getElementById("confirm");
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!dialog || !form.dataset.confirm || form.dataset.confirmed) return;
  event.preventDefault();
  dialog.querySelector("#confirm-title").textContent = form.dataset.confirmTitle;
  dialog.querySelector("#confirm-text").textContent = form.dataset.confirm;
  dialog.querySelector("#confirm-yes").textContent = form.dataset.confirmYes;
  dialog.returnValue = "no";
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "yes") return;
    form.dataset.confirmed = "true";
    form.requestSubmit();
  }, { once: true });
  dialog.showModal();
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await copy(button.dataset.copy);
  button.classList.add("copied");
  setTimeout(() => button.classList.remove("copied"), 1200);
});

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // without TLS browsers give no clipboard
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "visually-hidden";
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
