// #/chat?latent=12&scale=5...    a conversation with an instruct model, steered and not. Both sides get the reader's
// messages; each goes on with its own answers. The conversation ends with the page, and only its settings are in the
// address.
"use strict";

const turns = []; // {user, unsteered, steered}, of which both sides have an answer

addView("chat", "Chat", async (given) => {
  document.title = `Chat – ${index.title}`;
  const about = await modelOrWhyNot("Chat");
  if (about && route().name === "chat" && !stands("chat", given)) showChat(kept("chat", given), about);
});

function showChat(given, about) {
  if (about.noChat)
    return cannotSteer("Chat", `${about.noChat}; with a dictionary of an instruct model you can chat here.`);
  if (about.noSteering) return cannotSteer("Chat", about.noSteering);
  const message = h("textarea", { rows: "3" });
  const settings = steering("chat", given, about, () => ({}));
  const alert = h("p.status.failed", { role: "alert" });
  const log = h("div.turns", null, ...turns.map((turn) => turn.node));
  const buttons = buttonsOf("Send", "Enter", send);
  const clear = button("Start over", {}, () => {
    writing?.abort();
    turns.length = 0;
    log.replaceChildren();
    message.focus();
  });
  const box = field("Message", message);
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    buttons.act();
  });
  stand(
    "chat",
    () => {},
    h("h1", { tabindex: "-1" }, "Chat"),
    h(
      "p.soft",
      null,
      "Both sides get your messages, and each goes on with its own answers. Steering holds for the whole ",
      "conversation, at all tokens but the special ones of the template; what you change counts from the next message.",
    ),
    h("div.card", null, ...settings.panel),
    log,
    h("div.card", null, box, h("div.tools", null, buttons.begin, buttons.stop, clear, alert)),
  );

  async function send() {
    const user = message.value;
    if (!user.trim()) return;
    try {
      const told = (side) => [
        ...turns.flatMap((turn) => [
          { role: "user", content: turn.user },
          { role: "assistant", content: turn[side] },
        ]),
        { role: "user", content: user },
      ];
      const content = { unsteered: told("unsteered"), steered: told("steered"), ...settings.asked() };
      const written = columns(`, answer ${turns.length + 1}`);
      const node = h(
        "div.turn",
        null,
        h("p.user", { dir: "auto" }, h("b", null, "You "), visibleText(user)),
        written.node,
      );
      log.append(node);
      message.value = "";
      await writeInto(written, content, buttons, alert);
      if (!node.isConnected) return; // the reader has started over, or left
      const [unsteered, steered] = Object.keys(SIDES).map((side) => written.of[side].said);
      // What was stopped goes on from where it was; a turn without an answer never was.
      if (unsteered && steered) turns.push({ user, unsteered, steered, node });
      else {
        node.remove();
        message.value ||= user;
      }
    } catch (error) {
      alert.textContent = error.message;
    }
  }
}
